// Implicit GEMM for backward_weight:  gw[k, c, t] = sum over pixels p of  x[source(p, t), c] * gy[p, k]
//
//   rows (register tile)       columns (vectors)   depth
//   in channels, of one tap    out channels        pixels, line by line
//
// A row is broadcast, so that x may lie anyhow: each tap reads it where it lies, only where it is inside. gy needs
// channels innermost: as NHWC lies; NCHW is transposed into panels, once a chunk and not once a tap.
//
// Few in channels (stems) do not fill a tile. Then the lines of x that a chunk reads are copied with their padding, and
// the rows of a tile are any (in channel, tap). 16-bit types are widened by the same copies.
//
// Groups of few out channels do not fill a vector. Then its lanes belong to several groups, and each is multiplied with
// the in channels of its own, which a permutation spreads over the lanes.
//
// Pointwise convolutions are one product over all pixels of a plane or batch; in and out channels change places where
// that makes fuller tiles or a cheaper transposition.
//
// Sums: pixels in chunks of at most kSumLength, each from a fresh accumulator and added to the totals in order. Where the
// result is small against the pixels, slabs of chunks have totals of their own, added in order at the end. Chunks and
// slabs are cut by the shape alone. Threads split slabs, groups, rows and columns: the bits do not depend on them.
// Declines: types other than floating-point, empty sums, kernels above kMaxTaps.
#include <limits>
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/finite.h"
#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kFoldChannels = 7;           // up to so many in channels the rows of a tile are of several taps
constexpr int64_t kFoldedPointers = 64 << 10;  // to the rows of a chunk; above it nothing is folded
constexpr int64_t kStripBytes = 512 << 10;     // copied lines of a chunk, aimed at
constexpr int64_t kMaxCopied = 64 << 10;       // with a padding mode other than zeros lines are copied whole
constexpr int64_t kPanelBytes = 2 << 20;       // gy of a chunk, packed
constexpr int64_t kTileBytes = 256 << 10;      // x of a chunk, packed
constexpr int64_t kConflict = 2 << 10;         // where pixels are multiples of it apart
constexpr int64_t kTotalBytes = 16 << 20;      // totals of all threads together, unless one tile of each is more
constexpr int64_t kMostSlabs = 16;
constexpr int64_t kLeastSlabPixels = 512;
constexpr int64_t kSlabValues = 128 << 10;  // totals of all slabs together: threads fetch them from each other

// The problem with its sides in their roles: the channels of x are rows, those of gy columns. Exchanged, x and gy have
// changed places. A pointwise convolution of stride 1 has all pixels in one line (NHWC), or a line for each sample.
struct Problem {
  ConvShape s;
  int64_t weight_group;  // between groups of the result
  bool exchanged = false;
  bool strided = false;       // what is in the place of gy has gaps
  ActivationStrides columns;  // and these strides

  Problem(const ConvShape& shape, int tile_rows, int lanes, int vectors)
      : s(shape), weight_group(shape.out_per_group * shape.weight_stride[0]) {
    bool pointwise = s.taps() == 1, merges = true;
    for (int d = 0; d < 3; ++d) pointwise = pointwise && s.pad[d] == 0, merges = merges && s.stride[d] == 1;
    if (pointwise && merges) {
      const int64_t pixels = s.out_pixels() * (s.channels_last() ? s.batch : 1);
      if (s.channels_last()) s.batch = 1;
      for (int d = 0; d < 3; ++d) s.in[d] = s.out[d] = d < 2 ? 1 : pixels;
    }
    exchanged = pointwise && (s.groups == 1 || 2 * std::min(s.in_per_group, s.out_per_group) > lanes) &&
                cost(s.out_per_group, s.in_per_group, s.weight_stride[1], tile_rows, lanes, vectors, !merges) <
                    cost(s.in_per_group, s.out_per_group, s.weight_stride[0], tile_rows, lanes, vectors, false);
    columns = activation_strides(s.layout, s.out_channels(), s.out);
    if (!exchanged) return;
    strided = !merges;
    columns = activation_strides(s.layout, s.in_channels(), s.in);
    for (int d = 0; d < 3; ++d) columns.axis[d] *= s.stride[d], s.stride[d] = 1, s.in[d] = s.out[d];
    std::swap(s.in_per_group, s.out_per_group);
    std::swap(s.weight_stride[0], s.weight_stride[1]);
  }

  // About how many cycles a group of a pointwise convolution takes.
  double cost(int64_t rows, int64_t columns, int64_t weight_step, int tile_rows, int lanes, int vectors,
              bool gaps) const {
    const Panels panels(columns, lanes, vectors);
    const bool in_place = s.channels_last() && dtype_size(s.dtype) > 2;
    const double packing = gaps ? s.channels_last() ? 3 : 40 : in_place ? 0.5 : 5;
    const double tile = 0.5 * std::max(panels.width == lanes ? 1.3 : 1.0, 8.0 / tile_rows);
    const double pixels = static_cast<double>(s.batch * s.out_pixels()), writing = weight_step == 1 ? 2 : 10;
    // Columns are fetched ahead in the order of memory; rows that lie far apart come back from far away for each panel.
    const double again = in_place && panels.count > 1 ? 0.3 : 0;
    return static_cast<double>(panels.vectors) * (pixels * (tile * rows + packing) + writing * rows) +
           pixels * rows * again;
  }
};

// Pixels [begin, end) of the lines [first, last); a line is (n, d, h), and only a single line is ever cut.
struct Chunk {
  int64_t first, last, begin, end;
  int64_t lines() const { return last - first; }
  int64_t length() const { return end - begin; }
  int64_t pixels() const { return lines() * length(); }
};

// How the sum is cut, and how its operands are reached: by the shape and the width of a vector.
struct Plan {
  bool folded, lanes;                        // rows of several taps; lanes of several groups
  bool copies, packs, tiles;                 // x is copied by lines; gy is packed; so is x, a tile of rows at a time
  int64_t groups, rows, taps, columns;       // rows and columns of a group; with lanes, all columns are one group
  int64_t unit;                              // columns of a vector
  int64_t lines, line_length;                // of gy
  int64_t lines_per_chunk, pixels_per_line;  // the largest chunk
  int64_t chunks_per_line, chunks, slabs;
  int64_t line_taps, strip_lines, strip_length;  // of the copies of the largest chunk

  bool padded() const { return folded || lanes; }  // the copies have their padding

  Plan(const Problem& problem, int64_t word_size, int64_t vector) {
    const ConvShape& s = problem.s;
    const bool half = dtype_size(s.dtype) == 2;
    groups = s.groups, rows = s.in_per_group, taps = s.taps(), columns = s.out_per_group, unit = vector;
    lines = s.batch * s.out[0] * s.out[1], line_length = s.out[2];
    line_taps = s.kernel[0] * s.kernel[1];
    const double reach = static_cast<double>(s.kernel[2] - 1) * static_cast<double>(s.dilation[2]) + 1;
    const auto touched = [&](int64_t pixels) {
      const double all = static_cast<double>(pixels - 1) * static_cast<double>(s.stride[2]) + reach;
      if (padded()) return static_cast<int64_t>(std::min(all, 1e12));
      if (s.padding_mode != PaddingMode::kZeros) return s.in[2];
      return static_cast<int64_t>(std::min(all, static_cast<double>(s.in[2])));
    };
    const int64_t together = std::min(groups, vector / columns);  // groups of a vector
    lanes = groups > 1 && (together > 1 ? together * rows <= vector : together == 1 && taps > 1);
    folded = !lanes && rows <= kFoldChannels && taps > 1;
    const int64_t channels = lanes ? together * rows : rows;  // that are copied together
    const int64_t room = kStripBytes / word_size / channels / line_taps;
    // Lines too long, or too many taps, are not copied.
    if (padded() && (touched(std::min<int64_t>(16, line_length)) > room || rows * taps > kFoldedPointers))
      lanes = folded = false;
    packs = half || lanes || problem.strided || !s.channels_last() || s.out_channels() * word_size >= 2048;
    if (lanes) unit = together * columns, columns *= groups, groups = 1;

    // Lanes: lines of x and gy stay in L1 for all taps and channels of a vector.
    const int64_t most = lanes   ? kSumLength / 2
                         : packs ? std::clamp<int64_t>(kPanelBytes / (columns * word_size), 64, kSumLength)
                                 : kSumLength;
    pixels_per_line = std::min(line_length, most);
    while (padded() && pixels_per_line > 16 && touched(pixels_per_line) > room) pixels_per_line /= 2;
    chunks_per_line = ceil_div(line_length, pixels_per_line);
    pixels_per_line = ceil_div(line_length, chunks_per_line);
    int64_t fit = most / line_length;
    if (padded()) fit = std::min({fit, room / touched(pixels_per_line), kFoldedPointers / (rows * taps)});
    lines_per_chunk = chunks_per_line > 1 ? 1 : std::clamp<int64_t>(fit, 1, lines);
    chunks = chunks_per_line * ceil_div(lines, lines_per_chunk);
    // As many slabs as there are pixels and room for, a power of two, and chunks of nearly equal size for each.
    const double values = static_cast<double>(groups * rows * taps) * static_cast<double>(columns);
    const double pixels = static_cast<double>(lines) * static_cast<double>(line_length);
    slabs = 1;
    while (slabs < kMostSlabs && 2 * slabs <= chunks && pixels >= 2.0 * slabs * kLeastSlabPixels &&
           values * 2 * slabs <= kSlabValues)
      slabs *= 2;
    if (chunks_per_line == 1) {
      lines_per_chunk = ceil_div(lines, std::min(lines, round_up(chunks, slabs)));
      chunks = ceil_div(lines, lines_per_chunk);
    }
    slabs = std::min(slabs, chunks);
    copies = padded() || half;
    // Pixels at such distances meet in few sets of the second cache.
    tiles = !copies && s.channels_last() && taps == 1 && lines == 1 && s.in_channels() * word_size % kConflict == 0 &&
            columns >= 2 * vector;
    // Neighbouring lines share those they touch, inside a sample.
    const int64_t reach_h = std::min((s.kernel[1] - 1) * std::min(s.dilation[1], s.in[1]) + 1, s.in[1]);
    const int64_t planes = std::min(lines_per_chunk, (lines_per_chunk - 1) / s.out[1] + 2);
    const int64_t shared = s.kernel[0] * (lines_per_chunk * std::min(s.stride[1], s.in[1]) + planes * reach_h);
    strip_lines = std::min(line_taps * lines_per_chunk, shared) + 1;
    strip_length = touched(pixels_per_line);
  }

  int64_t pixels() const { return lines_per_chunk * pixels_per_line; }  // of the largest chunk

  Chunk chunk(int64_t i) const {
    const int64_t first = i / chunks_per_line * lines_per_chunk, begin = i % chunks_per_line * pixels_per_line;
    return {first, std::min(lines, first + lines_per_chunk), begin, std::min(line_length, begin + pixels_per_line)};
  }
};

// How the work is split into tasks, and the scratch of a thread, in words.
struct Split {
  bool in_place;          // totals are the result itself
  int64_t rows, columns;  // of one task
  int64_t row_tasks, column_tasks, tasks;
  int64_t block;                        // channels whose lines are copied at a time
  int64_t panels, strip, totals, slab;  // scratch; totals of a slab

  Split(const Problem& problem, const Plan& plan, int64_t tile_rows, int64_t vector, int64_t vectors, int64_t word_size,
        int threads) {
    const ConvShape& s = problem.s;
    const int64_t lanes = plan.unit, row_tiles = plan.padded() ? 1 : ceil_div(plan.rows, tile_rows);
    const int64_t column_vectors = ceil_div(plan.columns, lanes);
    const int64_t problems = plan.groups * plan.slabs;
    in_place = plan.slabs == 1 && plan.taps == 1 && s.weight_stride[0] == 1 && dtype_size(s.dtype) > 2;
    const auto settle = [&](int64_t row_parts, int64_t column_parts) {
      rows = plan.padded() ? plan.rows : std::min(plan.rows, ceil_div(row_tiles, row_parts) * tile_rows);
      columns = std::min(plan.columns, ceil_div(column_vectors, column_parts) * lanes);
      if (plan.lanes && !s.channels_last()) columns = lanes;  // planes are read from beginning to end
      row_tasks = ceil_div(plan.rows, rows), column_tasks = ceil_div(plan.columns, columns);
      tasks = problems * row_tasks * column_tasks;
    };
    // The cost of the thread with most to do.
    const auto cost = [&] {
      const Panels of_task(columns, lanes, plan.lanes ? 1 : vectors);
      const double tile = of_task.width == lanes ? 1.3 : 1.0;
      const double each = 0.5 * tile * static_cast<double>(rows * plan.taps * of_task.vectors) +
                          (plan.packs ? 5.0 : 0.0) * of_task.vectors + (plan.copies ? 2.0 : 0.2) * rows / 16;
      return each * static_cast<double>(ceil_div(tasks, threads));
    };
    settle(1, 1);
    double best = cost();
    int64_t row_parts = 1, column_parts = 1;
    if (problems < 4 * threads)
      for (int64_t c = 1; c <= std::min<int64_t>(column_vectors, 2 * threads); ++c)
        for (int64_t r = ceil_div(threads, problems * c); r <= row_tiles; r += threads) {
          settle(r, c);
          if (cost() < 0.97 * best) best = cost(), row_parts = r, column_parts = c;
          if (r > threads) break;
        }
    settle(row_parts, column_parts);
    const auto totals_of = [&] { return in_place || plan.slabs > 1 ? 0 : rows * plan.taps * columns; };
    while (totals_of() * word_size * threads > kTotalBytes && (row_parts < row_tiles || columns > lanes)) {
      if (row_parts < row_tiles)
        row_parts *= 2;
      else
        column_parts *= 2;
      settle(row_parts, column_parts);
    }
    block = plan.lanes ? lanes / s.out_per_group * s.in_per_group : rows;
    if (plan.tiles)
      block = std::min(rows, round_up(std::max<int64_t>(kTileBytes / word_size / plan.pixels(), 1), tile_rows));
    if (plan.copies && !plan.padded())
      block = std::clamp<int64_t>(kStripBytes / word_size / (plan.strip_lines * plan.strip_length), 1, block);
    panels = plan.packs ? plan.pixels() * (plan.lanes ? 1 : ceil_div(columns, lanes)) * vector : 0;
    strip = plan.copies ? plan.strip_lines * plan.strip_length * block : plan.tiles ? block * plan.pixels() : 0;
    totals = totals_of();
    slab = plan.slabs > 1 ? plan.groups * plan.rows * plan.taps * plan.columns : 0;
  }
  int64_t of_thread() const { return panels + strip + totals + 1; }  // and a zero
};

// Where lines of x lie: as they are, or copied for a chunk, as words
//   NHWC, or lanes  [line][position][channel]     NCHW  [line][channel][position]
template <typename T>
class Lines {
 public:
  using W = Word<T>;
  int64_t row = 0, step = 0;  // between channels, between positions

  Lines(const ConvShape& s, const Plan& plan, const Kernels<T>& kernels, W* strip)
      : s_(s),
        plan_(plan),
        kernels_(kernels),
        x_stride_(activation_strides(s.layout, s.in_channels(), s.in)),
        strip_(strip) {}

  // Channels [channel, channel + channels) of the lines, as far as the chunk reads them.
  void start(const T* x, int64_t channel, int64_t channels, const Chunk& chunk, const GatherAxis& axis) {
    x_ = x + channel * x_stride_.channel;
    row = x_stride_.channel, step = x_stride_.axis[2];
    if (!plan_.copies) return;
    channels_ = channels, ids_.clear();
    lo_ = std::numeric_limits<int64_t>::max(), hi_ = std::numeric_limits<int64_t>::min();
    for (int64_t t = 0; t < axis.taps(); ++t) {
      const int64_t low = axis.offset[t] + chunk.begin * axis.from_step;
      lo_ = std::min(lo_, low), hi_ = std::max(hi_, low + (chunk.length() - 1) * axis.from_step + 1);
    }
    if (!plan_.padded()) {
      const bool far = axis.mode != PaddingMode::kZeros;
      lo_ = far ? 0 : std::clamp<int64_t>(lo_, 0, s_.in[2]), hi_ = far ? s_.in[2] : std::clamp(hi_, lo_, s_.in[2]);
    }
    interleaved_ = s_.channels_last() || plan_.lanes;
    row = interleaved_ ? 1 : hi_ - lo_, step = interleaved_ ? channels : 1;
    size_ = (hi_ - lo_) * channels;
    if (plan_.padded()) {
      ids_.push_back(-1);
      std::fill_n(strip_, size_, W(0));
    }
  }

  // Where position 0 of the first channel of a line would be; of d or h below 0, a line of zeros.
  const W* line(int64_t n, int64_t d, int64_t h) {
    if (!plan_.copies) {
      if constexpr (!kIsHalf<T>) return x_ + n * x_stride_.batch + d * x_stride_.axis[0] + h * x_stride_.axis[1];
    }
    const int64_t none = -lo_ * step;
    if (d < 0 || h < 0) return strip_ + none;
    const int64_t id = (n * s_.in[0] + d) * s_.in[1] + h, count = static_cast<int64_t>(ids_.size());
    for (int64_t i = count - 1; i >= 0; --i)
      if (ids_[i] == id) return strip_ + i * size_ + none;
    ids_.push_back(id);
    copy(x_ + n * x_stride_.batch + d * x_stride_.axis[0] + h * x_stride_.axis[1], strip_ + count * size_);
    return strip_ + count * size_ + none;
  }

 private:
  void copy(const T* from, W* to) const {
    const int64_t inside = std::clamp<int64_t>(lo_, 0, s_.in[2]), outside = std::clamp<int64_t>(hi_, inside, s_.in[2]);
    positions(from, to, inside, inside, outside - inside);
    for (int64_t w = lo_; w < hi_; ++w) {
      if (w == inside) w = outside;
      if (w == hi_) break;
      const int64_t source = padded_index(w, s_.in[2], s_.padding_mode);
      if (source >= 0)
        positions(from, to, source, w, 1);
      else
        for (int64_t c = 0; c < channels_; ++c) to[(w - lo_) * step + c * row] = W(0);
    }
  }
  void positions(const T* from, W* to, int64_t source, int64_t w, int64_t count) const {
    from += source * x_stride_.axis[2], to += (w - lo_) * step;
    if (!interleaved_)
      kernels_.copy_rows(from, x_stride_.channel, channels_, count, to, row);
    else if (!s_.channels_last())
      kernels_.transpose(from, x_stride_.channel, channels_, count, to, step);
    else if (channels_ == s_.in_channels())
      kernels_.copy_rows(from, 0, 1, count * channels_, to, 0);
    else
      kernels_.copy_rows(from, x_stride_.axis[2], count, channels_, to, step);
  }

  const ConvShape& s_;
  const Plan& plan_;
  const Kernels<T>& kernels_;
  const ActivationStrides x_stride_;
  W* const strip_;
  const T* x_ = nullptr;
  bool interleaved_ = false;
  int64_t channels_ = 0, lo_ = 0, hi_ = 0, size_ = 0;
  std::vector<int64_t> ids_;
};

// to[p * width + c] = from[c * channel + p * step]
template <typename T>
void gather(const Kernels<T>& kernels, const T* from, int64_t channel, int64_t step, int64_t channels, int64_t pixels,
            Word<T>* to, int64_t width) {
  constexpr int64_t kTile = 64;
  T square[kMaxVectors * 16 * kTile];
  for (int64_t p0 = 0; p0 < pixels; p0 += kTile) {
    const int64_t count = std::min(kTile, pixels - p0);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < count; ++p) square[c * kTile + p] = from[c * channel + (p0 + p) * step];
    kernels.transpose(square, kTile, channels, count, to + p0 * width, width);
  }
}

// gw of rows x columns of a group, from totals [row][tap][column] or [tap][row][column].
template <typename T>
void write(const ConvShape& s, const Kernels<T>& kernels, const Word<T>* totals, int64_t ld, int64_t row_step,
           int64_t tap_step, int64_t rows, int64_t columns, T* gw) {
  const int64_t* const stride = s.weight_stride;
  const auto piece = [&](const Word<T>* from, int64_t from_step, int64_t count, T* to, int64_t to_row) {
    if (stride[0] == 1) return kernels.store_rows(from, from_step, count, columns, to, to_row);
    if (to_row == 1) return kernels.store_transposed(from, from_step, count, columns, to, stride[0]);
    constexpr int64_t kTile = 16;
    T square[kTile * kTile];
    for (int64_t r0 = 0; r0 < count; r0 += kTile)
      for (int64_t c0 = 0; c0 < columns; c0 += kTile) {
        const int64_t height = std::min(kTile, count - r0), width = std::min(kTile, columns - c0);
        kernels.store_rows(from + r0 * from_step + c0, from_step, height, width, square, kTile);
        for (int64_t c = 0; c < width; ++c)
          for (int64_t r = 0; r < height; ++r) to[(r0 + r) * to_row + (c0 + c) * stride[0]] = square[r * kTile + c];
      }
  };
  const int64_t taps = s.taps();
  bool dense = tap_step == 1 && (rows == 1 || stride[1] == taps);
  for (int64_t d = 2, step = 1; d >= 0; step *= s.kernel[d--])
    dense = dense && (s.kernel[d] == 1 || stride[2 + d] == step);
  if (dense) return piece(totals, ld, rows * taps, gw, 1);
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t tw = t % s.kernel[2], th = t / s.kernel[2] % s.kernel[1], td = t / (s.kernel[2] * s.kernel[1]);
    piece(totals + t * tap_step * ld, row_step * ld, rows, gw + td * stride[2] + th * stride[3] + tw * stride[4],
          stride[1]);
  }
}

// Rows in tiles of nearly equal height: f(first row, rows).
template <typename F>
void each_tile(int64_t rows, int64_t tile_rows, const F& f) {
  const int64_t tiles = ceil_div(rows, tile_rows);
  for (int64_t i = 0, row = 0; i < tiles; ++i) {
    const int64_t height = rows / tiles + (i < rows % tiles);
    f(row, height);
    row += height;
  }
}

template <typename T>
void run(const ConvShape& shape, const void* grad_output, const void* input, T* gw, Word<T>* workspace, int threads) {
  using W = Word<T>;
  const Kernels<T>& stored = kernels_of<T>(microkernels());  // pack and round
  const Kernels<W>& kernels = kernels_of<W>(microkernels());
  const Problem problem(shape, kernels.rows, kernels.lanes, kernels.vectors);
  const ConvShape& s = problem.s;
  const Plan plan(problem, sizeof(W), kernels.lanes);
  const Split split(problem, plan, kernels.rows, kernels.lanes, kernels.vectors, sizeof(W), threads);
  const T* const x = static_cast<const T*>(problem.exchanged ? grad_output : input);
  const T* const gy = static_cast<const T*>(problem.exchanged ? input : grad_output);
  const GatherAxis axis[3] = {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)};
  const ActivationStrides& y_stride = problem.columns;
  const int64_t taps = plan.taps, line_taps = plan.line_taps, vector = kernels.lanes;
  W* const slabs = workspace + threads * split.of_thread();

  // What is read in the padding may be left out if it is a zero that meets finite values only.
  bool skips = s.padding_mode == PaddingMode::kZeros && !plan.padded();
  bool inside = true;
  for (const GatherAxis& a : axis)
    for (int64_t t = 0; t < a.taps(); ++t) inside = inside && a.first_inside(t) == 0 && a.last_inside(t) == a.count;
  if (skips && !inside) skips = all_finite(stored, gy, s.batch * s.out_channels() * s.out_pixels());
  const bool complete = inside || skips || plan.padded();

  // Rows of totals are [row][tap] or [tap][row], as the weight has them.
  const bool taps_inside = plan.folded ? s.weight_stride[1] != 1 : s.weight_stride[1] != 1 || taps == 1;

  parallel_tasks(split.tasks, s.macs() / split.tasks, [&](int64_t begin, int64_t end) {
    W* const panels_data = workspace + at::get_thread_num() * split.of_thread();
    W* const strip = panels_data + split.panels;
    W* const thread_totals = strip + split.strip;
    W* const zero = thread_totals + split.totals;
    *zero = W(0);
    Lines<T> x_lines(s, plan, stored, strip);
    std::vector<const W*> origins(plan.lines_per_chunk * line_taps), pointers, outside;
    std::vector<int64_t> b_offsets(plan.lines_per_chunk), outside_offsets;

    for (int64_t task = begin; task < end; ++task) {
      const int64_t k0 = task % split.column_tasks * split.columns;
      const int64_t columns = std::min(split.columns, plan.columns - k0);
      const int64_t c0 = task / split.column_tasks % split.row_tasks * split.rows;
      const int64_t rows = std::min(split.rows, plan.rows - c0);
      const int64_t problem_index = task / (split.column_tasks * split.row_tasks);
      const int64_t group = problem_index % plan.groups, slab = problem_index / plan.groups;
      const Panels panels(columns, plan.unit, plan.lanes ? 1 : kernels.vectors);
      T* const result = gw + group * problem.weight_group + c0 * s.weight_stride[1] + k0 * s.weight_stride[0];
      // Totals of this task, at row, tap 0.
      W* totals = thread_totals;
      int64_t ld = columns, row_step = taps_inside ? taps : 1, tap_step = taps_inside ? 1 : rows;
      if (plan.slabs > 1) {
        ld = plan.columns, tap_step = taps_inside ? 1 : plan.rows;
        totals = slabs + slab * split.slab + group * plan.rows * taps * ld + c0 * row_step * ld + k0;
      }
      if constexpr (!kIsHalf<T>)
        if (split.in_place) totals = result, ld = s.weight_stride[1];

      const int64_t chunk0 = plan.chunks * slab / plan.slabs, chunk1 = plan.chunks * (slab + 1) / plan.slabs;
      for (int64_t i = chunk0; i < chunk1; ++i) {
        const Chunk chunk = plan.chunk(i);
        const int64_t length = chunk.length(), pixels = chunk.pixels();
        const bool first_chunk = i == chunk0;
        const int64_t k_first = group * s.out_per_group + k0, of_sample = s.out[0] * s.out[1];
        const auto panel_at = [&](int64_t j) {
          return panels_data + (plan.lanes ? 0 : panels.begin(j) / plan.unit * vector * pixels);
        };
        const auto pack = [&](int64_t j) {
          W* to = panel_at(j);
          const int64_t size = panels.size(j), width = round_up(size, vector), k = k_first + panels.begin(j);
          if (s.channels_last() && !problem.strided) {
            const int64_t pixel = chunk.first * plan.line_length + chunk.begin;
            return stored.copy_rows(gy + pixel * s.out_channels() + k, s.out_channels(), pixels, size, to, width);
          }
          // Lines that follow each other, or one line.
          for (int64_t line = chunk.first, next; line < chunk.last; line = next) {
            const int64_t n = line / of_sample, d = line % of_sample / s.out[1], h = line % s.out[1];
            next = problem.strided ? line + 1 : std::min(chunk.last, (n + 1) * of_sample);
            const T* const from = gy + n * y_stride.batch + k * y_stride.channel + d * y_stride.axis[0] +
                                  h * y_stride.axis[1] + chunk.begin * y_stride.axis[2];
            const int64_t count = (next - line) * length;
            if (s.channels_last())
              stored.copy_rows(from, y_stride.axis[2], count, size, to, width);
            else if (problem.strided)
              gather(stored, from, y_stride.channel, y_stride.axis[2], size, count, to, width);
            else
              stored.transpose(from, y_stride.channel, size, count, to, width);
            to += count * width;
          }
        };
        if (plan.packs && !plan.lanes)
          for (int64_t j = 0; j < panels.count; ++j) pack(j);
        // gy of the chunk: a panel, and the distance between its pixels.
        const auto columns_at = [&](int64_t j) -> std::pair<const W*, int64_t> {
          if constexpr (!kIsHalf<T>)
            if (!plan.packs) {
              const int64_t pixel = chunk.first * plan.line_length + chunk.begin;
              return {gy + pixel * s.out_channels() + k_first + panels.begin(j), s.out_channels()};
            }
          return {panel_at(j), round_up(panels.size(j), vector)};
        };
        // Where gy is read as it lies, the next chunk of it is fetched into L2 meanwhile.
        const W *ahead = nullptr, *end_ahead = nullptr, *x_ahead = nullptr, *x_end = nullptr;
        if constexpr (!kIsHalf<T>)
          if ((!plan.packs || (plan.lanes && s.channels_last())) && i + 1 < chunk1) {
            const Chunk next = plan.chunk(i + 1);
            ahead = gy + (next.first * plan.line_length + next.begin) * s.out_channels();
            end_ahead = ahead + next.pixels() * s.out_channels();
            const int64_t d = next.first / s.out[1] % s.out[0], n = next.first / of_sample;
            const int64_t line = std::min(d * s.stride[0], s.in[0] - 1) * s.in[1] +
                                 std::min(next.first % s.out[1] * s.stride[1], s.in[1] - 1);
            x_ahead = x + (n * s.in[0] * s.in[1] + line) * s.in[2] * s.in_channels();
            x_end = x_ahead + next.lines() * s.stride[1] * s.in[2] * s.in_channels();
          }
        // Multiplies a tile of rows with a panel: `count` runs of `depth` pixels.
        const auto multiply = [&](int64_t height, int64_t count, int64_t depth, const W* const* a, int64_t a_offset,
                                  int64_t a_step, const int64_t* b_pixels, W* c, int64_t c_step, bool accumulate,
                                  int64_t j) {
          W* c_rows[kMaxRows];
          for (int64_t r = 0; r < height; ++r) c_rows[r] = c + r * c_step + panels.begin(j);
          const auto [b, ldb] = columns_at(j);
          int64_t offsets[kSumLength];
          for (int64_t l = 0; l < count; ++l) offsets[l] = b_pixels[l] * ldb;
          kernels.gemm[height - 1]({.taps = count,
                                    .depth = depth,
                                    .a = a,
                                    .a_offset = a_offset,
                                    .a_step = a_step,
                                    .b = b,
                                    .b_offsets = offsets,
                                    .ldb = ldb,
                                    .c = c_rows,
                                    .cols = panels.size(j),
                                    .row_bias = nullptr,
                                    .column_bias = nullptr,
                                    .accumulate = accumulate,
                                    .next = ahead < end_ahead ? ahead : nullptr});
          if (ahead) ahead += count * depth * height;
        };

        // Tiles of rows with panels of columns: a panel is used for all tiles, unless so few pixels are summed that the
        // time goes into writing; then lines of the result are written from beginning to end.
        constexpr int64_t kFewBytesOfColumns = 16 << 10;
        const bool by_rows = pixels * columns * static_cast<int64_t>(sizeof(W)) <= kFewBytesOfColumns;
        const auto each_product = [&](int64_t all_rows, const auto& f) {
          if (by_rows)
            return each_tile(all_rows, kernels.rows, [&](int64_t row, int64_t height) {
              for (int64_t j = 0; j < panels.count; ++j) f(row, height, j);
            });
          for (int64_t j = 0; j < panels.count; ++j)
            each_tile(all_rows, kernels.rows, [&](int64_t row, int64_t height) { f(row, height, j); });
        };

        // Lanes: panel by panel. Else blocks of rows.
        for (int64_t b0 = 0, b1; b0 < (plan.lanes ? panels.count : rows); b0 = b1) {
          b1 = plan.lanes ? b0 + 1 : std::min(rows, b0 + split.block);
          const int64_t block = b1 - b0;
          if (plan.lanes) {
            pack(b0);
            const int64_t first = (k0 + panels.begin(b0)) / s.out_per_group;
            x_lines.start(x, first * rows, panels.size(b0) / s.out_per_group * rows, chunk, axis[2]);
          } else {
            x_lines.start(x, group * s.in_per_group + c0 + b0, block, chunk, axis[2]);
          }
          // Where each line of gy meets position 0 of a line of x, for each (td, th).
          const W** origin = origins.data();
          for (int64_t line = chunk.first; line < chunk.last; ++line) {
            const int64_t h = line % s.out[1], d = line / s.out[1] % s.out[0], n = line / (s.out[1] * s.out[0]);
            for (int64_t td = 0; td < s.kernel[0]; ++td)
              for (int64_t th = 0; th < s.kernel[1]; ++th) {
                const int64_t sd = axis[0].source(d, td), sh = axis[1].source(h, th);
                *origin++ = !plan.padded() && (sd < 0 || sh < 0) ? nullptr : x_lines.line(n, sd, sh);
              }
          }
          const int64_t step = axis[2].from_step * x_lines.step;

          const auto position = [&](int64_t t) {  // of the first pixel of a line, at a tap
            return (axis[2].offset[t % s.kernel[2]] + chunk.begin * axis[2].from_step) * x_lines.step;
          };
          b_offsets.resize(chunk.lines());
          for (int64_t l = 0; l < chunk.lines(); ++l) b_offsets[l] = l * length;

          if constexpr (!kIsHalf<T>)
            if (plan.tiles) {
              // [tile][pixel][row of the tile], read in the order of memory.
              const T* const first = origins[0] + chunk.begin * step;
              constexpr int64_t kAtOnce = 16;
              for (int64_t p = 0; p < pixels; p += kAtOnce)
                each_tile(block, kernels.rows, [&](int64_t row, int64_t height) {
                  kernels.copy_rows(first + p * step + row, step, std::min(kAtOnce, pixels - p), height,
                                    strip + row * pixels + p * height, height);
                });
              const T* pointers_of_tile[kMaxRows];
              for (int64_t r = 0; r < kMaxRows; ++r) pointers_of_tile[r] = strip + r;
              each_product(block, [&](int64_t row, int64_t height, int64_t j) {
                multiply(height, 1, pixels, pointers_of_tile, row * pixels, height, b_offsets.data(),
                         totals + (b0 + row) * row_step * ld, row_step * ld, !first_chunk, j);
              });
              continue;
            }
          if (plan.lanes) {
            pointers.resize(chunk.lines() * taps);
            for (int64_t l = 0; l < chunk.lines(); ++l)
              for (int64_t t = 0; t < taps; ++t)
                pointers[l * taps + t] = origins[l * line_taps + t / s.kernel[2]] + position(t);
            for (int64_t l = 0; l < chunk.lines(); ++l) b_offsets[l] *= vector;
            kernels.lanes_of_groups({.runs = chunk.lines(),
                                     .depth = length,
                                     .taps = taps,
                                     .channels = rows,
                                     .group_cols = s.out_per_group,
                                     .a = pointers.data(),
                                     .a_step = step,
                                     .b = panels_data,
                                     .b_offsets = b_offsets.data(),
                                     .ldb = vector,
                                     .c = totals + panels.begin(b0),
                                     .c_tap = tap_step * ld,
                                     .c_channel = row_step * ld,
                                     .cols = panels.size(b0),
                                     .accumulate = !first_chunk,
                                     .next = ahead});
            if (ahead) ahead += pixels * ceil_div(taps, 3) * (64 / sizeof(W));
            if (ahead >= end_ahead) ahead = x_ahead, end_ahead = x_end, x_ahead = nullptr;
            continue;
          }
          if (plan.folded) {
            const int64_t all = rows * taps;
            pointers.resize(all * chunk.lines());
            each_tile(all, kernels.rows, [&](int64_t row, int64_t height) {
              const W** const list = pointers.data() + row * chunk.lines();
              for (int64_t r = 0; r < height; ++r) {
                const int64_t c = taps_inside ? (row + r) / taps : (row + r) % rows;
                const int64_t t = taps_inside ? (row + r) % taps : (row + r) / rows;
                const int64_t at = c * x_lines.row + position(t);
                for (int64_t l = 0; l < chunk.lines(); ++l)
                  list[l * height + r] = origins[l * line_taps + t / s.kernel[2]] + at;
              }
            });
            each_product(all, [&](int64_t row, int64_t height, int64_t j) {
              multiply(height, chunk.lines(), length, pointers.data() + row * chunk.lines(), 0, step, b_offsets.data(),
                       totals + row * ld, ld, !first_chunk, j);
            });
            continue;
          }

          for (int64_t t = 0; t < taps; ++t) {
            const int64_t tw = t % s.kernel[2], line_tap = t / s.kernel[2];
            const int64_t w0 = std::clamp(axis[2].first_inside(tw), chunk.begin, chunk.end);
            const int64_t w1 = std::clamp(axis[2].last_inside(tw), w0, chunk.end);
            W* const of_tap = totals + (t * tap_step + b0 * row_step) * ld;
            // Runs of pixels inside. Two lists of pointers, for tiles of either height.
            const int64_t tiles = ceil_div(block, kernels.rows), low = block / tiles, high = low + (block % tiles > 0);
            pointers.resize(chunk.lines() * (low + high));
            b_offsets.clear();
            const W **to_low = pointers.data(), **to_high = to_low + chunk.lines() * low;
            const W *front = nullptr, *expected = nullptr;
            bool joined = w0 == chunk.begin && w1 == chunk.end;  // all runs are one
            for (int64_t l = 0; l < chunk.lines(); ++l) {
              const W* const line = origins[l * line_taps + line_tap];
              if (!line || w0 == w1) continue;
              const W* const run = line + (axis[2].offset[tw] + w0 * axis[2].from_step) * x_lines.step;
              if (front) joined = joined && run == expected && b_offsets.back() == (l - 1) * length;
              if (!front) front = run;
              expected = run + length * step;
              b_offsets.push_back(l * length + w0 - chunk.begin);
              for (int64_t r = 0; r < low; ++r) *to_low++ = run + r * x_lines.row;
              if (high > low)
                for (int64_t r = 0; r < high; ++r) *to_high++ = run + r * x_lines.row;
            }
            const auto runs = static_cast<int64_t>(b_offsets.size());
            const int64_t count = joined ? std::min<int64_t>(runs, 1) : runs;
            const int64_t depth = joined ? runs * length : w1 - w0;
            if (runs == 0 && first_chunk)
              for (int64_t r = 0; r < block; ++r) std::fill_n(of_tap + r * row_step * ld, columns, W(0));
            const W* const* const of_low = pointers.data();
            const W* const* const of_high = of_low + chunk.lines() * low;
            if (runs > 0)
              each_product(block, [&](int64_t row, int64_t height, int64_t j) {
                multiply(height, count, depth, height == low ? of_low : of_high, row * x_lines.row, step,
                         b_offsets.data(), of_tap + row * row_step * ld, row_step * ld, !first_chunk, j);
              });
            if (complete) continue;
            // The pixels that read elsewhere, one by one.
            outside.clear(), outside_offsets.clear();
            const bool zeros = axis[2].mode == PaddingMode::kZeros;
            for (int64_t l = 0; l < chunk.lines(); ++l)
              for (int64_t w = chunk.begin; w < chunk.end; ++w) {
                const W* const line = origins[l * line_taps + line_tap];
                if (line && w >= w0 && w < w1) continue;
                outside_offsets.push_back(l * length + w - chunk.begin);
                for (int64_t r = 0; r < kernels.rows; ++r)
                  outside.push_back(zeros ? zero : line + axis[2].source(w, tw) * x_lines.step + r * x_lines.row);
              }
            const auto pixels_outside = static_cast<int64_t>(outside_offsets.size());
            if (pixels_outside == 0) continue;
            each_product(block, [&](int64_t row, int64_t height, int64_t j) {
              pointers.resize(pixels_outside * height);
              for (int64_t p = 0; p < pixels_outside; ++p)
                std::copy_n(outside.data() + p * kernels.rows, height, pointers.data() + p * height);
              multiply(height, pixels_outside, 1, pointers.data(), zeros ? 0 : row * x_lines.row, 1,
                       outside_offsets.data(), of_tap + row * row_step * ld, row_step * ld, true, j);
            });
          }
        }
      }
      if (totals == thread_totals) write(s, stored, totals, ld, row_step, tap_step, rows, columns, result);
    }
  });
  if (plan.slabs == 1) return;

  // The slabs are added up, a few rows at a time.
  constexpr int64_t kRowsAtOnce = 8;
  const int64_t pieces = taps_inside ? ceil_div(plan.rows, kRowsAtOnce) : 1;
  const int64_t row_step = taps_inside ? taps : 1, tap_step = taps_inside ? 1 : plan.rows;
  const double macs = static_cast<double>(split.slab) * plan.slabs / (plan.groups * pieces);
  parallel_tasks(plan.groups * pieces, macs, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / pieces, row = plan.rows * (i % pieces) / pieces;
      const int64_t rows = plan.rows * (i % pieces + 1) / pieces - row;
      W* const sums = slabs + (group * plan.rows + row) * taps * plan.columns;
      for (int64_t slab = 1; slab < plan.slabs; ++slab)
        kernels.add_row(sums, sums + slab * split.slab, rows * taps * plan.columns);
      write(s, stored, sums, plan.columns, row_step, tap_step, rows, plan.columns,
            gw + group * problem.weight_group + row * s.weight_stride[1]);
    }
  });
}

}  // namespace

const char* implicit_gemm_backward_weight_decline(const ConvShape& s) {
  if (!is_floating_point(s.dtype)) return "only floating-point types";
  if (s.batch == 0 || s.in_pixels() == 0 || s.out_pixels() == 0) return "nothing to sum over";
  if (s.in_per_group == 0 || s.out_per_group == 0) return "nothing to sum over";
  if (s.taps() > kMaxTaps) return "more than 16384 taps";
  if (dtype_size(s.dtype) == 2 && s.padding_mode != PaddingMode::kZeros && s.in[2] > kMaxCopied)
    return "lines above 65536 values, 16 bits each";
  return nullptr;
}

int64_t implicit_gemm_backward_weight_workspace(const ConvShape& s, int threads) {
  return with_type(s.dtype, [&](auto zero) {
    using W = Word<decltype(zero)>;
    const Kernels<W>& kernels = kernels_of<W>(microkernels());
    const Problem problem(s, kernels.rows, kernels.lanes, kernels.vectors);
    const Plan plan(problem, sizeof(W), kernels.lanes);
    const Split split(problem, plan, kernels.rows, kernels.lanes, kernels.vectors, sizeof(W), threads);
    return static_cast<int64_t>(sizeof(W)) * (threads * split.of_thread() + plan.slabs * split.slab);
  });
}

void implicit_gemm_backward_weight(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  with_type(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    run<T>(s, p.grad_output, p.input, static_cast<T*>(p.result), static_cast<Word<T>*>(workspace), threads);
  });
}

}  // namespace myconv::cpu
