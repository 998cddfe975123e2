// Winograd's algorithm for backward_weight: winograd.cpp's with the results in the part of the taps. Over tiles of gy,
// and what they read of x:
//
//     gw = A^T [ sum over tiles of (G gy G^T) * (B^T x B) ] A           3x3: 36 products for 9 x 16
//
//     Z[panel of k][position][tile][k] = G gy G^T        tiles of gy, zero beyond the last result
//     V[panel of c][position][tile][c] = B^T x B         tiles of x, with their padding
//     M[position] = Z[position]^T x V[position]        a matrix product for each position, reduced over tiles
//     gw[k][c] = A^T M[.][k][c] A
//
// Kernels are those of winograd.cpp, whose tiles are as large there and here: 3x3 with stride 1 and 2, 5x5, 1x3 to 7x1.
// Of a third axis every tap is a block of columns of its own.
//
// Tiles are taken in chunks, as many as are worth a transform of their M and are summed from a fresh accumulator. Z and V
// of a chunk stay in L2 or L3; M is of one panel of rows and columns, and is transformed at once while it is in L2. What
// comes out of the chunks is added in order. NCHW transposes the lines of a few tiles at a time.
//
// Where the result is small against the tiles, slabs of chunks have totals of their own, added in order at the end.
//
// Threads split groups, slabs, columns and rows, each with Z and V of its own part. Chunks and slabs are cut by the shape
// alone: the bits do not depend on threads.
// If anything is not finite, in which case an infinity may have spread, the next row of the table computes all of it.
// 16-bit types are float32 from the transforms of what is read to the sum of the chunks, and rounded there.
// Declines: other kernels, strides and types. Yields where another row takes less time.
#include <atomic>
#include <cmath>

#include "cpu/algorithms.h"
#include "cpu/bias_sums.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/tables.h"
#include "cpu/winograd_tiles.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kChunkBytes = 4 << 20;  // of all Z and V of a chunk
constexpr int64_t kFewestTiles = 32;      // of a chunk, if there are
constexpr int64_t kTilesInL2 = 64;        // of a chunk, if they stay in L2
constexpr int64_t kL2Bytes = 768 << 10;
constexpr int64_t kMostTiles = 256;      // errors of the transforms add up
constexpr int64_t kRows = 32;            // of a panel
constexpr int64_t kPieceTiles = 32;      // that are read at a time
constexpr int64_t kAllBytes = 32 << 20;  // of all threads, besides kThreadBytes of each
constexpr int64_t kThreadBytes = 2 << 20;
constexpr int64_t kMostSlabs = 16;
constexpr int64_t kSlabBytes = 4 << 20;  // totals of all slabs together
constexpr int64_t kMostFrames = 64;      // taps of the third axis
constexpr int64_t kFewChannels = 8;      // whose transforms are not shared by enough products

struct Problem {
  const ConvShape& s;
  const WinogradKernels<float>& transforms;
  GatherAxis third;
  TileAxis x_h, x_w, gy_h, gy_w;
  int64_t tiles;

  Problem(const ConvShape& shape, const WinogradKernels<float>& t)
      : s(shape),
        transforms(t),
        third(forward_axis(s, 0)),
        x_h(forward_axis(s, 1), t.out[0], t.in[0], /*in_order=*/false),
        x_w(forward_axis(s, 2), t.out[1], t.in[1], /*in_order=*/true),
        gy_h(x_h.of_results()),
        gy_w(x_w.of_results()),
        tiles(s.batch * s.out[0] * x_h.tiles() * x_w.tiles()) {}
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;
  int64_t taps() const { return transforms.taps[0] * transforms.taps[1]; }
};

int64_t most_tiles(const ConvShape& s, const WinogradKernels<float>& t) {
  const int64_t of_tile =
      t.positions * (s.kernel[0] * s.in_per_group + s.out_per_group) * static_cast<int64_t>(sizeof(float));
  // Each of a tile's positions lies in a page of its own: better few tiles, that stay in L2, than many.
  if (kTilesInL2 * of_tile <= kL2Bytes) return kTilesInL2;
  return std::clamp(kChunkBytes / of_tile, kFewestTiles, kMostTiles);
}

// Sizes, in elements. The chunks depend on the shape alone.
struct Plan {
  int64_t chunks, chunk;  // and tiles of the largest
  int64_t slabs;
  int64_t width, panels_of_tap, panels;  // of columns
  int64_t rows, row_panels;
  int64_t column_parts, row_parts;
  int64_t v_step, z_step, m_row, v_panel, z_panel, v, z, m, totals, strip;
  int64_t shared, slab, of_thread;  // slab: totals of one, of a group

  Plan(const Problem& p, int64_t lanes, int64_t vectors, int threads) {
    const ConvShape& s = p.s;
    const int64_t positions = p.transforms.positions;
    chunks = ceil_div(p.tiles, most_tiles(s, p.transforms));
    chunk = ceil_div(p.tiles, chunks);
    const double bytes = static_cast<double>(s.out_channels()) * static_cast<double>(s.in_per_group) *
                         static_cast<double>(s.taps()) * sizeof(float);
    slabs = std::min({chunks, kMostSlabs, std::max<int64_t>(1, static_cast<int64_t>(kSlabBytes / bytes))});

    row_panels = ceil_div(s.out_per_group, kRows);
    rows = round_up(ceil_div(s.out_per_group, row_panels), 8);
    const int64_t wanted = ceil_div(threads, s.groups * slabs);
    // A thread repeats the transforms of what it does not split: those of gy take less.
    const int64_t column_vectors = ceil_div(s.in_per_group, lanes);
    int64_t best = -1;
    for (int64_t n = vectors; n > vectors / 2; --n) {
      const int64_t count = s.kernel[0] * ceil_div(column_vectors, n), parts = std::min(count, wanted);
      const int64_t most = ceil_div(count, parts) * n;  // vectors of one part
      if (best < 0 || 16 * most < 15 * best) best = most, width = std::min(n, column_vectors) * lanes;
    }
    panels_of_tap = ceil_div(s.in_per_group, width);
    panels = s.kernel[0] * panels_of_tap;
    column_parts = std::min(panels, wanted);
    row_parts = 1;
    if (column_parts < wanted) {
      row_parts = ceil_div(wanted, column_parts);
      rows = std::min(rows, round_up(ceil_div(s.out_per_group, row_parts), 8));
      row_panels = ceil_div(s.out_per_group, rows);
      row_parts = std::min(row_parts, row_panels);
    }
    v_step = position_step(chunk * width), z_step = position_step(chunk * rows);
    v_panel = positions * v_step, z_panel = positions * z_step;
    m_row = position_step(positions * width), m = rows * m_row;
    strip = 0;
    if (!s.channels_last())
      strip = std::max(TileReader<float>::strip_size(p.x_h, p.x_w, kPieceTiles, s.in_per_group),
                       TileReader<float>::strip_size(p.gy_h, p.gy_w, kPieceTiles, s.out_per_group));
    for (;;) {
      const int64_t of_columns = ceil_div(panels, column_parts), of_rows = ceil_div(row_panels, row_parts);
      v = of_columns * v_panel, z = of_rows * z_panel;
      totals = slabs > 1 ? 0 : p.taps() * width * (chunks == 1 ? 1 : of_columns * of_rows * rows);
      of_thread = round_up(v + z + m + totals + strip, 16);
      if (of_thread * static_cast<int64_t>(sizeof(float)) <= kAllBytes / threads + kThreadBytes) break;
      if (of_columns == 1 && of_rows == 1) break;
      if (of_columns * width >= of_rows * rows || of_rows == 1)
        column_parts = ceil_div(panels, ceil_div(of_columns, 2));
      else
        row_parts = ceil_div(row_panels, ceil_div(of_rows, 2));
    }
    slab = slabs > 1 ? panels * row_panels * rows * p.taps() * width : 0;
    shared = round_up(std::max(s.in_per_group, s.out_per_group), 16) + s.groups * slabs * slab;
  }
  // Where the totals of a row of a panel of columns lie in a slab, or among those of a part, whose panels of rows they
  // are counted in.
  int64_t total(int64_t column, int64_t row, int64_t k, int64_t of_rows, int64_t of_k) const {
    return ((column * of_rows + row) * rows + k) * of_k;
  }
};

template <typename T>
class WeightGradient {
 public:
  WeightGradient(const Problem& problem, const Plan& plan, const ConvPointers& p, float* workspace)
      : p_(problem),
        s_(problem.s),
        t_(problem.transforms),
        plan_(plan),
        kernels_(microkernels().f32),
        stored_(kernels_of<T>(microkernels())),
        x_(static_cast<const T*>(p.input)),
        gy_(static_cast<const T*>(p.grad_output)),
        gw_(static_cast<T*>(p.result)),
        x_stride_(activation_strides(s_.layout, s_.in_channels(), s_.in)),
        gy_stride_(activation_strides(s_.layout, s_.out_channels(), s_.out)),
        zeros_(reinterpret_cast<T*>(workspace)),
        scratch_(workspace + plan_.shared),
        slabs_(scratch_ - s_.groups * plan_.slabs * plan_.slab),
        of_k_(p_.taps() * plan_.width),
        bias_(s_, p, plan_.slabs) {
    std::fill_n(zeros_, std::max(s_.in_per_group, s_.out_per_group), T{});
  }

  // Whether all of it is finite.
  bool run() {
    std::atomic<bool> finite = true;
    const int64_t parts = plan_.column_parts * plan_.row_parts, tasks = s_.groups * plan_.slabs * parts;
    const double macs =
        static_cast<double>(t_.positions) * p_.tiles * s_.in_per_group * s_.kernel[0] * s_.out_per_group;
    parallel_tasks(tasks, macs / (plan_.slabs * parts), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t column_part = task % plan_.column_parts, row_part = task / plan_.column_parts % plan_.row_parts;
        const int64_t slab = task / parts % plan_.slabs;
        if (!compute({task / parts / plan_.slabs, slab, plan_.panels * column_part / plan_.column_parts,
                      plan_.panels * (column_part + 1) / plan_.column_parts,
                      plan_.row_panels * row_part / plan_.row_parts,
                      plan_.row_panels * (row_part + 1) / plan_.row_parts}))
          finite = false;
      }
    });
    if (plan_.slabs > 1 && finite) add_slabs();
    bias_.store();
    return finite;
  }

 private:
  // Panels [column0, column1) and [row0, row1) of a slab of a group.
  struct Part {
    int64_t group, slab, column0, column1, row0, row1;
  };
  // A panel of columns: in channels of a tap of the third axis.
  struct Columns {
    int64_t tap, channel, count;
  };
  Columns columns(int64_t panel) const {
    const int64_t channel = panel % plan_.panels_of_tap * plan_.width;
    return {panel / plan_.panels_of_tap, channel, std::min(plan_.width, s_.in_per_group - channel)};
  }
  int64_t rows(int64_t panel) const { return std::min(plan_.rows, s_.out_per_group - panel * plan_.rows); }

  bool compute(const Part& part) {
    float* const v = scratch_ + at::get_thread_num() * plan_.of_thread;
    float *const z = v + plan_.v, *const m = z + plan_.z, *const totals = m + plan_.m,
                 *const strip = totals + plan_.totals;
    float* const slab = slabs_ + (part.group * plan_.slabs + part.slab) * plan_.slab;
    const int64_t chunk0 = plan_.chunks * part.slab / plan_.slabs,
                  chunk1 = plan_.chunks * (part.slab + 1) / plan_.slabs;
    bool finite = true;
    for (int64_t chunk = chunk0; chunk < chunk1; ++chunk) {
      const int64_t first = p_.tiles * chunk / plan_.chunks, last = p_.tiles * (chunk + 1) / plan_.chunks;
      read_tiles(part, first, last, strip, v, z);
      if (part.column0 == 0) {  // others read the same gy
        const int64_t k0 = part.row0 * plan_.rows, k1 = std::min(part.row1 * plan_.rows, s_.out_per_group);
        bias_.add(part.slab, first, last, p_.tiles, part.group * s_.out_per_group + k0, k1 - k0);
      }
      for (int64_t column = part.column0; column < part.column1; ++column)
        for (int64_t row = part.row0; row < part.row1; ++row) {
          float* total = totals;
          if (plan_.slabs > 1)
            total = slab + plan_.total(column, row, 0, plan_.row_panels, of_k_);
          else if (plan_.chunks > 1)
            total += plan_.total(column - part.column0, row - part.row0, 0, part.row1 - part.row0, of_k_);
          multiply(last - first, z + (row - part.row0) * plan_.z_panel, rows(row),
                   v + (column - part.column0) * plan_.v_panel, columns(column).count, m);
          for (int64_t k = 0; k < rows(row); ++k) {
            finite &= t_.gradient(m + k * plan_.m_row, plan_.width, columns(column).count, total, plan_.width,
                                  chunk > chunk0);
            if (plan_.slabs == 1 && chunk + 1 == chunk1)
              store(part.group, row * plan_.rows + k, columns(column), total);
            if (plan_.chunks > 1) total += of_k_;
          }
        }
    }
    return finite;
  }

  void add_slabs() const {
    parallel_tasks(s_.groups * plan_.panels * plan_.row_panels, static_cast<double>(plan_.slabs * plan_.rows * of_k_),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t group = i / (plan_.panels * plan_.row_panels);
                       const int64_t column = i / plan_.row_panels % plan_.panels, row = i % plan_.row_panels;
                       for (int64_t k = 0; k < rows(row); ++k) {
                         float* const total = slabs_ + group * plan_.slabs * plan_.slab +
                                              plan_.total(column, row, k, plan_.row_panels, of_k_);
                         kernels_.add_rows(total, total + plan_.slab, plan_.slab, plan_.slabs - 1, of_k_);
                         store(group, row * plan_.rows + k, columns(column), total);
                       }
                     }
                   });
  }

  void read_tiles(const Part& part, int64_t first, int64_t last, float* strip, float* v, float* z) const {
    const auto& stored = stored_.winograd[&t_ - kernels_.winograd];
    const TileReader<T> x{
        p_.x_h, p_.x_w, stored.input, t_.input, stored_, s_.channels_last(), x_stride_.axis, x_stride_.channel, zeros_};
    const TileReader<T> gy{
        p_.gy_h, p_.gy_w, stored.result, t_.result, stored_, s_.channels_last(), gy_stride_.axis, gy_stride_.channel,
        zeros_};
    const int64_t k0 = part.row0 * plan_.rows, k1 = std::min(part.row1 * plan_.rows, s_.out_per_group);
    for (int64_t piece = first; piece < last; piece += kPieceTiles)
      each_rectangle(
          p_.x_h, p_.x_w, s_.out[0], piece, std::min(piece + kPieceTiles, last),
          [&](const TileRectangle& r, int64_t before) {
            before += piece - first;
            gy.read(r,
                    gy_ + r.image * gy_stride_.batch + r.frame * gy_stride_.axis[0] +
                        (part.group * s_.out_per_group + k0) * gy_stride_.channel,
                    k1 - k0, strip, {z + before * plan_.rows, plan_.rows, plan_.z_panel, plan_.z_step, plan_.rows});
            for (int64_t column = part.column0; column < part.column1;) {
              const Columns from = columns(column);
              const int64_t panels = std::min(part.column1, (from.tap + 1) * plan_.panels_of_tap) - column;
              const int64_t count = std::min(panels * plan_.width, s_.in_per_group - from.channel);
              const int64_t frame = p_.third.source(r.frame, from.tap);
              float* const to = v + before * plan_.width + (column - part.column0) * plan_.v_panel;
              column += panels;
              if (frame >= 0) {
                x.read(r,
                       x_ + r.image * x_stride_.batch + frame * x_stride_.axis[0] +
                           (part.group * s_.in_per_group + from.channel) * x_stride_.channel,
                       count, strip, {to, plan_.width, plan_.v_panel, plan_.v_step, plan_.width});
                continue;
              }
              for (int64_t i = 0; i < panels; ++i)
                for (int64_t position = 0; position < t_.positions; ++position)
                  std::fill_n(to + i * plan_.v_panel + position * plan_.v_step, r.count() * plan_.width, 0.0f);
            }
          });
  }

  // m[row][position][column] = sum over tiles of z[position][tile][row] * v[position][tile][column]
  void multiply(int64_t tiles, const float* z, int64_t rows, const float* v, int64_t cols, float* m) const {
    for (int64_t position = 0; position < t_.positions; ++position)
      kernels_.winograd_product({.depth = tiles,
                                 .a = z + position * plan_.z_step,
                                 .lda = plan_.rows,
                                 .rows = rows,
                                 .b = v + position * plan_.v_step,
                                 .ldb = plan_.width,
                                 .cols = cols,
                                 .c = m + position * plan_.width,
                                 .ldc = plan_.m_row});
  }

  // taps[tap][column] of out channel k to where they belong.
  void store(int64_t group, int64_t k, const Columns& to, const float* taps) const {
    const int64_t* const stride = s_.weight_stride;
    T* const gw = gw_ + (group * s_.out_per_group + k) * stride[0] + to.channel * stride[1] + to.tap * stride[2];
    const int64_t taps_w = t_.taps[1], count = p_.taps();
    const bool run = (taps_w == 1 || stride[4] == 1) && (t_.taps[0] == 1 || stride[3] == taps_w);
    if (run && stride[1] != 1) return stored_.store_transposed(taps, plan_.width, count, to.count, gw, stride[1]);
    for (int64_t tap = 0; tap < count; ++tap) {
      T* const at = gw + tap / taps_w * stride[3] + tap % taps_w * stride[4];
      if (stride[1] == 1)
        stored_.store_rows(taps + tap * plan_.width, 0, 1, to.count, at, 0);
      else
        stored_.store_transposed(taps + tap * plan_.width, plan_.width, 1, to.count, at, stride[1]);
    }
  }

  const Problem& p_;
  const ConvShape& s_;
  const WinogradKernels<float>& t_;
  const Plan& plan_;
  const Kernels<float>& kernels_;  // of everything between the transforms
  const Kernels<T>& stored_;
  const T* const x_;
  const T* const gy_;
  T* const gw_;
  const ActivationStrides x_stride_, gy_stride_;
  T* const zeros_;
  float *const scratch_, *const slabs_;
  const int64_t of_k_;  // totals of a row of a panel of columns
  BiasSums<T> bias_;
};

// The transforms for a shape: of large tiles.
const WinogradKernels<float>* transforms(const ConvShape& s) {
  return find_transforms(microkernels().f32, s, Direction::kBackwardWeight, /*small=*/false);
}

const char* decline(const ConvShape& shape) {
  const ConvShape s = lines_as_frames(shape, Direction::kBackwardWeight);
  if (!is_floating_point(s.dtype) || s.dtype == Dtype::kFloat64) return "only float32 and 16-bit types";
  if (s.batch == 0 || s.in_per_group == 0 || s.out_per_group == 0 || s.in_pixels() == 0 || s.out_pixels() == 0)
    return "nothing to sum over";
  const WinogradKernels<float>* const t = transforms(s);
  if (t == nullptr) return "no tiles for this kernel, stride or dilation";
  if (s.kernel[0] > kMostFrames) return "more than 64 taps in depth";
  // Its rounding errors are those of a whole tile, whatever part of it there is.
  for (int d = 0; d < 2; ++d)
    if (s.kernel[d + 1] > 1 && s.out[d + 1] < t->out[d] * s.dilation[d + 1]) return "results smaller than a tile";
  return nullptr;
}

// Estimates in cycles of one core, of one group, found as those of winograd.cpp are. 32 products take a cycle or two
// (multiply_cycles), and wait for operands from L2; a vector of a position, and one of M in each chunk, what it takes to
// transform it.
constexpr double kProducts = 0.85, kOperandWaits = 0.87;
constexpr double kTransformed = 2.7, kOfChunk = 1.1, kOfResult = 0.5;
constexpr double kTransposed = 0.65;  // NCHW: of eight pixels of a tile
constexpr double kPhases = 1.1e5;     // parallel regions, one after the other
constexpr double kDirect = 1.15;
constexpr double kLines = 1.25;  // where frames are lines: tiles of few results, and x read once for each tap

double product_cycles() { return multiply_cycles() / 4; }

double winograd_cycles(const ConvShape& s, const WinogradKernels<float>& t) {
  const double rows = s.out_per_group, vectors = std::ceil(static_cast<double>(s.in_per_group * s.kernel[0]) / 16);
  const auto tiles_of = [&](int d) {
    const int64_t dilation = s.kernel[d] > 1 ? std::min(s.dilation[d], s.out[d]) : 1;
    const int64_t longer = s.out[d] % dilation, length = s.out[d] / dilation, out = t.out[d - 1];
    return static_cast<double>(longer * ceil_div(length + 1, out) + (dilation - longer) * ceil_div(length, out));
  };
  const double tiles = static_cast<double>(s.batch * s.out[0]) * tiles_of(1) * tiles_of(2);
  const double chunks = std::ceil(tiles / static_cast<double>(most_tiles(s, t))), positions = t.positions;
  // NCHW transposes what a tile reads.
  double moved = s.channels_last() ? 0 : 8 * kTransposed;
  for (int d = 0; d < 2; ++d) moved *= t.out[d];
  return (kProducts * product_cycles() + kOperandWaits) * positions * tiles * rows * vectors / 2 +
         (kTransformed * positions + moved) * tiles * (std::ceil(rows / 16) + vectors) +
         (chunks * kOfChunk + kOfResult) * positions * rows * vectors + kPhases / static_cast<double>(s.groups);
}

const char* yield(const ConvShape& shape) {
  const ConvShape s = lines_as_frames(shape, Direction::kBackwardWeight);
  if (s.in_per_group < kFewChannels || s.out_per_group < kFewChannels) return "few channels";
  // implicit_gemm multiplies pairs of bfloat16; packing them takes as long as ever.
  const double faster = s.dtype == Dtype::kBFloat16 && dense_kernels<bfloat16>().pair > 1 ? 1.5 : 1;
  const double direct = kDirect * product_cycles() * s.macs() / static_cast<double>(s.groups) / 32 / faster;
  const double lines = s.kernel[0] == shape.kernel[0] ? 1 : kLines;
  return direct < lines * winograd_cycles(s, *transforms(s)) ? "the transforms cost more than they save" : nullptr;
}

// What computes results that are not finite.
const Algorithm& next_row(const ConvShape& s) {
  const AlgorithmTable& rows = table(Direction::kBackwardWeight);
  for (int i = 0; i < rows.size; ++i)
    if (rows.rows[i].workspace != winograd_backward_weight().workspace && rows.rows[i].decline(s) == nullptr)
      return rows.rows[i];
  return rows.rows[rows.size - 1];
}

int64_t workspace(const ConvShape& shape, int threads) {
  const ConvShape s = lines_as_frames(shape, Direction::kBackwardWeight);
  const Kernels<float>& k = microkernels().f32;
  const Problem problem(s, *transforms(s));
  const Plan plan(problem, k.lanes, k.vectors, threads);
  return std::max((plan.shared + threads * plan.of_thread) * static_cast<int64_t>(sizeof(float)),
                  next_row(shape).workspace(shape, threads));
}

void run(const ConvShape& shape, const ConvPointers& p, void* workspace, int threads) {
  const ConvShape s = lines_as_frames(shape, Direction::kBackwardWeight);
  const Kernels<float>& k = microkernels().f32;
  const Problem problem(s, *transforms(s));
  const Plan plan(problem, k.lanes, k.vectors, threads);
  with_type(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>)
      if (!WeightGradient<T>(problem, plan, p, static_cast<float*>(workspace)).run())
        next_row(shape).run(shape, p, workspace, threads);
  });
}

}  // namespace

Algorithm winograd_backward_weight() {
  return {"winograd",
          decline,
          workspace,
          run,
          {"lines of both activations, into strips, and tiles, transformed", "tiles of both activations, transformed"},
          yield};
}

}  // namespace myconv::cpu
