// Implicit GEMM for backward_weight:  gw[k, c, t] = sum over pixels p of  x[source(p, t), c] * gy[p, k]
//
//   rows (register tile)       columns (vectors)   depth
//   in channels, of one tap    out channels        pixels, line by line
//
// A row is broadcast, so that x may lie anyhow: each tap reads it where it lies, only where it is inside. gy needs
// channels innermost: as NHWC lies; NCHW is transposed into panels, once a chunk and not once a tap.
//
// Few in channels (stems) do not fill a tile. Then the lines of x that a chunk reads are copied with their padding, and
// the rows of a tile are any (in channel, tap). 16-bit types are widened by the same copies, or made into words of two
// pixels that follow each other in a line of gy: then there is a copy of what each tap along the line reads.
//
// Groups of few out channels do not fill a vector. Then its lanes belong to several groups, and each is multiplied with
// the in channels of its own, which a permutation spreads over the lanes.
//
// With few out channels x and gy change places, for then these are few in channels. What the padding adds, zeros times gy,
// is then left out, and zeros times x that is not in the sum are added: if the result is not finite, it is computed again.
//
// Pointwise convolutions are one product over all pixels of a plane or batch; in and out channels change places where
// that makes fuller tiles or a cheaper transposition.
//
// Sums: pixels in chunks of at most kSumLength, each from a fresh accumulator and added to the totals in order. Where the
// result is small against the pixels, slabs of chunks have totals of their own, added in order at the end. Chunks and
// slabs are cut by the shape alone. Threads split slabs, groups, rows and columns: the bits do not depend on them.
// Declines: types other than floating-point, empty sums, kernels above kMaxTaps.
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/bias_sums.h"
#include "cpu/finite.h"
#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/implicit_gemm_backward_weight_plan.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

using namespace weight_gradient;

constexpr int64_t kMaxCopied = 64 << 10;  // with a padding mode other than zeros lines are copied whole

// Where lines of x lie: as they are, or copied for a chunk, as words
//   NHWC, or lanes  [line][position][channel]     NCHW  [line][channel][position]
// or, of pairs of pixels, as each tap along the line reads them
//   NHWC            [line][tap][pair][channel]    NCHW  [line][channel][tap][pair]
template <typename T>
class Lines {
 public:
  using W = Word<T>;
  int64_t row = 0, step = 0;  // between channels, between positions or pairs

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
    begin_ = chunk.begin, end_ = chunk.end, axis_ = &axis;
    if (!plan_.copies) return;
    channels_ = channels, ids_.clear();
    if (plan_.pair > 1) {
      const int64_t words = ceil_div(chunk.length(), plan_.pair);
      interleaved_ = s_.channels_last();
      lo_ = 0, size_ = channels * axis.taps() * words;
      row = interleaved_ ? 1 : axis.taps() * words, step = interleaved_ ? channels : 1, tap_ = words * step;
      return start_zeros();
    }
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
    if (plan_.padded()) start_zeros();
  }

  // Where the chunk begins in a line, as a tap along it reads it, and how far its pixels or pairs are apart.
  int64_t begin(int64_t tap) const {
    return plan_.pair > 1 ? tap * tap_ : (axis_->offset[tap] + begin_ * axis_->from_step) * step;
  }
  int64_t next() const { return plan_.pair > 1 ? step : axis_->from_step * step; }

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
  void start_zeros() {
    ids_.push_back(-1);
    std::fill_n(strip_, size_, W(0));
  }

  void copy(const T* from, W* to) const {
    if constexpr (kIsHalf<T>)
      if (plan_.pair > 1) return copy_pairs(from, to);
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

  // Pairs of pixels that both read inside, at once; others one by one.
  void copy_pairs(const T* from, W* to) const {
    const int64_t words = ceil_div(end_ - begin_, 2);
    for (int64_t tap = 0; tap < axis_->taps(); ++tap, to += tap_) {
      const int64_t first = std::clamp(axis_->first_inside(tap), begin_, end_);
      const int64_t last = std::clamp(axis_->last_inside(tap), first, end_);
      const int64_t inside = ceil_div(first - begin_, 2);
      const int64_t outside = std::max(inside, last == end_ ? words : (last - begin_) / 2);
      if (inside < outside) {
        const int64_t w = begin_ + 2 * inside;
        pairs(from + (w * axis_->from_step + axis_->offset[tap]) * x_stride_.axis[2],
              std::min(end_, begin_ + 2 * outside) - w, to + inside * step);
      }
      for (int64_t i = 0; i < words; ++i) {
        if (i == inside) i = outside;
        if (i == words) break;
        const int64_t w = begin_ + 2 * i, a = axis_->source(w, tap), b = w + 1 < end_ ? axis_->source(w + 1, tap) : -1;
        for (int64_t c = 0; c < channels_; ++c)
          to[i * step + c * row] = word(a < 0 ? nullptr : from + a * x_stride_.axis[2] + c * x_stride_.channel,
                                        b < 0 ? nullptr : from + b * x_stride_.axis[2] + c * x_stride_.channel);
      }
    }
  }
  void pairs(const T* from, int64_t pixels, W* to) const {
    const int64_t from_step = axis_->from_step * x_stride_.axis[2];
    if (interleaved_) return kernels_.copy_channels(from, from_step, pixels, channels_, to, step);
    if (from_step == 1) return kernels_.copy_rows(from, x_stride_.channel, channels_, pixels, to, row);
    for (int64_t c = 0; c < channels_; ++c)
      kernels_.copy_strided(from + c * x_stride_.channel, from_step, pixels, to + c * row);
  }
  static W word(const T* first, const T* second) {
    const uint16_t bits[2] = {first ? first->bits : uint16_t{0}, second ? second->bits : uint16_t{0}};
    W word;
    std::memcpy(&word, bits, sizeof(word));
    return word;
  }

  const ConvShape& s_;
  const Plan& plan_;
  const Kernels<T>& kernels_;
  const ActivationStrides x_stride_;
  W* const strip_;
  const T* x_ = nullptr;
  bool interleaved_ = false;
  const GatherAxis* axis_ = nullptr;
  int64_t channels_ = 0, begin_ = 0, end_ = 0, lo_ = 0, hi_ = 0, size_ = 0, tap_ = 0;
  std::vector<int64_t> ids_;
};

// to[p * width + c] = from[c * channel + p * step], words of neighbouring p
template <typename T>
void gather(const Kernels<T>& kernels, const Kernels<Word<T>>& of_words, const T* from, int64_t channel, int64_t step,
            int64_t channels, int64_t pixels, Word<T>* to, int64_t width) {
  constexpr int64_t kTile = 64;
  Word<T> square[kMaxVectors * 16 * kTile];
  for (; pixels > 0; pixels -= kTile, from += kTile * step, to += kTile / kernels.pair * width) {
    const int64_t count = std::min(kTile, pixels);
    for (int64_t c = 0; c < channels; ++c) kernels.copy_strided(from + c * channel, step, count, square + c * kTile);
    of_words.transpose(square, kTile, channels, ceil_div(count, kernels.pair), to, width);
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

// What all tasks have in common.
template <typename T>
struct Operands {
  using W = Word<T>;
  const Problem& problem;
  const Plan& plan;
  const Split& split;
  const Kernels<T>& stored;  // pack, multiply and round
  const Kernels<W>& kernels;
  const T *x, *gy;
  T* gw;
  BiasSums<T>& bias;
  W *of_threads, *slabs;
  GatherAxis axis[3];
  // Rows of totals are [row][tap] or [tap][row], as the weight has them.
  bool taps_inside;
  bool complete;  // nothing but pixels inside is to be multiplied

  Operands(const Problem& problem, const Plan& plan, const Split& split, const ConvPointers& p, BiasSums<T>& bias,
           W* workspace, int threads)
      : problem(problem),
        plan(plan),
        split(split),
        stored(plan.pair > 1 ? dense_kernels<T>() : kernels_of<T>(microkernels())),
        kernels(kernels_of<W>(microkernels())),
        x(static_cast<const T*>(problem.exchanged ? p.grad_output : p.input)),
        gy(static_cast<const T*>(problem.exchanged ? p.input : p.grad_output)),
        gw(static_cast<T*>(p.result) + problem.first_tap),
        bias(bias),
        of_threads(workspace),
        slabs(workspace + threads * split.of_thread()),
        axis{forward_axis(problem.s, 0), forward_axis(problem.s, 1), forward_axis(problem.s, 2)} {
    const ConvShape& s = problem.s;
    taps_inside = s.weight_stride[1] != 1 || (!plan.folded && plan.taps == 1);
    // What is read in the padding may be left out if it is a zero that meets finite values only.
    bool inside = true;
    for (const GatherAxis& a : axis)
      for (int64_t t = 0; t < a.taps(); ++t) inside = inside && a.first_inside(t) == 0 && a.last_inside(t) == a.count;
    complete =
        plan.padded() || inside ||
        (s.padding_mode == PaddingMode::kZeros && all_finite(stored, gy, s.batch * s.out_channels() * s.out_pixels()));
  }
};

// The tasks of a thread. A task is rows x columns of a group and slab, all taps: chunk by chunk, what gy has is packed or
// read where it lies (columns), x where it lies or in copies (Lines), and their product is added to the totals.
template <typename T>
class Worker {
 public:
  using W = Word<T>;

  explicit Worker(const Operands<T>& o)
      : o_(o),
        s_(o.problem.s),
        plan_(o.plan),
        kernels_(o.kernels),
        panels_data_(o.of_threads + at::get_thread_num() * o.split.of_thread()),
        strip_(panels_data_ + o.split.panels),
        thread_totals_(strip_ + o.split.strip),
        zero_(thread_totals_ + o.split.totals),
        lines_(s_, plan_, o.stored, strip_),
        origins_(plan_.lines_per_chunk * plan_.line_taps),
        b_offsets_(plan_.lines_per_chunk) {
    *zero_ = W(0);
  }

  void run(int64_t task) {
    const Split& split = o_.split;
    k0_ = task % split.column_tasks * split.columns, columns_ = std::min(split.columns, plan_.columns - k0_);
    c0_ = task / split.column_tasks % split.row_tasks * split.rows, rows_ = std::min(split.rows, plan_.rows - c0_);
    const int64_t problem_index = task / (split.column_tasks * split.row_tasks);
    const int64_t slab = problem_index / plan_.groups;
    group_ = problem_index % plan_.groups;
    panels_ = Panels(columns_, plan_.unit, plan_.lanes ? 1 : kernels_.vectors);
    T* const result = o_.gw + group_ * o_.problem.weight_group + c0_ * s_.weight_stride[1] + k0_ * s_.weight_stride[0];
    totals_ = thread_totals_, ld_ = columns_;
    row_step_ = o_.taps_inside ? plan_.taps : 1, tap_step_ = o_.taps_inside ? 1 : rows_;
    if (plan_.slabs > 1) {
      ld_ = plan_.columns, tap_step_ = o_.taps_inside ? 1 : plan_.rows;
      totals_ = o_.slabs + slab * split.slab + group_ * plan_.rows * plan_.taps * ld_ + c0_ * row_step_ * ld_ + k0_;
    }
    if constexpr (!kIsHalf<T>)
      if (split.in_place) totals_ = result, ld_ = s_.weight_stride[1];

    const int64_t chunk0 = plan_.chunks * slab / plan_.slabs, chunk1 = plan_.chunks * (slab + 1) / plan_.slabs;
    for (int64_t i = chunk0; i < chunk1; ++i) {
      first_chunk_ = i == chunk0;
      add_chunk(i, chunk1);
      add_to_bias(slab);
    }
    if (totals_ == thread_totals_) write(s_, o_.stored, totals_, ld_, row_step_, tap_step_, rows_, columns_, result);
  }

 private:
  void add_chunk(int64_t i, int64_t end) {
    chunk_ = plan_.chunk(i);
    if (plan_.packs && !plan_.lanes)
      for (int64_t j = 0; j < panels_.count; ++j) pack(j);
    fetch_ahead(i + 1 < end ? i + 1 : -1);
    if (plan_.lanes) {
      for (int64_t j = 0; j < panels_.count; ++j) multiply_lanes(j);
      return;
    }
    for (int64_t b0 = 0; b0 < rows_; b0 += o_.split.block) {
      const int64_t block = std::min(rows_ - b0, o_.split.block);
      start_lines(group_ * s_.in_per_group + c0_ + b0, block);
      if (plan_.tiles)
        multiply_packed_tiles(b0, block);
      else if (plan_.folded)
        multiply_folded();
      else
        for (int64_t t = 0; t < plan_.taps; ++t) multiply_tap(t, b0, block);
    }
  }

  // What the chunk has of the grad_output, by one of the tasks that read it. Mirrored, its pixels are others, as many to
  // each chunk.
  void add_to_bias(int64_t slab) const {
    const bool exchanged = o_.problem.exchanged;
    if ((exchanged ? k0_ : c0_) > 0) return;
    const int64_t begin = chunk_.first * plan_.line_length + chunk_.begin, all = plan_.lines * plan_.line_length;
    const int64_t end = (chunk_.last - 1) * plan_.line_length + chunk_.end;
    if (exchanged)
      o_.bias.add(slab, begin, end, all, group_ * plan_.rows + c0_, rows_);
    else
      o_.bias.add(slab, begin, end, all, group_ * plan_.columns + k0_, columns_);
  }

  // Panel j of gy, packed: [pixel of the chunk][column].
  W* panel_at(int64_t j) const {
    return panels_data_ + (plan_.lanes ? 0 : panels_.begin(j) / plan_.unit * kernels_.lanes * chunk_.lines() * words());
  }
  int64_t words() const { return ceil_div(chunk_.length(), plan_.pair); }  // of a line

  void pack(int64_t j) const {
    const ActivationStrides& stride = o_.problem.columns;
    const int64_t size = panels_.size(j), width = round_up(size, kernels_.lanes), length = chunk_.length();
    const int64_t k = group_ * s_.out_per_group + k0_ + panels_.begin(j), of_sample = s_.out[0] * s_.out[1];
    W* to = panel_at(j);
    const bool follow = !o_.problem.strided && (length % plan_.pair == 0 || chunk_.lines() == 1);
    if (s_.channels_last() && follow) {
      const int64_t pixel = chunk_.first * plan_.line_length + chunk_.begin;
      return o_.stored.copy_channels(o_.gy + pixel * s_.out_channels() + k, s_.out_channels(), chunk_.pixels(), size,
                                     to, width);
    }
    // Lines that follow each other, or one line.
    for (int64_t line = chunk_.first, next; line < chunk_.last; line = next) {
      const int64_t n = line / of_sample, d = line % of_sample / s_.out[1], h = line % s_.out[1];
      next = follow ? std::min(chunk_.last, (n + 1) * of_sample) : line + 1;
      const T* const from = o_.gy + n * stride.batch + k * stride.channel + d * stride.axis[0] + h * stride.axis[1] +
                            chunk_.begin * stride.axis[2];
      const int64_t count = (next - line) * length;
      if (s_.channels_last())
        o_.stored.copy_channels(from, stride.axis[2], count, size, to, width);
      else if (o_.problem.strided)
        gather(o_.stored, kernels_, from, stride.channel, stride.axis[2], size, count, to, width);
      else
        o_.stored.transpose(from, stride.channel, size, count, to, width);
      to += ceil_div(count, plan_.pair) * width;
    }
  }

  // gy of the chunk: a panel, and the distance between its pixels.
  std::pair<const W*, int64_t> columns_at(int64_t j) const {
    if constexpr (!kIsHalf<T>)
      if (!plan_.packs) {
        const int64_t pixel = chunk_.first * plan_.line_length + chunk_.begin;
        return {o_.gy + pixel * s_.out_channels() + group_ * s_.out_per_group + k0_ + panels_.begin(j),
                s_.out_channels()};
      }
    return {panel_at(j), round_up(panels_.size(j), kernels_.lanes)};
  }

  // In NHWC the next chunk of gy is fetched into L2 meanwhile, and then of x.
  void fetch_ahead(int64_t chunk) {
    ahead_ = end_ahead_ = x_ahead_ = x_end_ = nullptr;
    if constexpr (!kIsHalf<T>)
      if (chunk >= 0 && s_.channels_last() && !o_.problem.strided) {
        const Chunk next = plan_.chunk(chunk);
        ahead_ = o_.gy + (next.first * plan_.line_length + next.begin) * s_.out_channels();
        end_ahead_ = ahead_ + next.pixels() * s_.out_channels();
        const int64_t d = next.first / s_.out[1] % s_.out[0], n = next.first / (s_.out[0] * s_.out[1]);
        const int64_t line = std::min(d * s_.stride[0], s_.in[0] - 1) * s_.in[1] +
                             std::min(next.first % s_.out[1] * s_.stride[1], s_.in[1] - 1);
        const int64_t pixels = next.lines() > 1 ? next.lines() * s_.stride[1] * s_.in[2] : next.length() * s_.stride[2];
        x_ahead_ = o_.x + ((n * s_.in[0] * s_.in[1] + line) * s_.in[2] + next.begin * s_.stride[2]) * s_.in_channels();
        x_end_ = x_ahead_ + pixels * s_.in_channels();
      }
  }

  // Where each line of gy meets position 0 of a line of x, for each (td, th), and where it lies in the panels.
  void start_lines(int64_t channel, int64_t channels) {
    lines_.start(o_.x, channel, channels, chunk_, o_.axis[2]);
    const W** origin = origins_.data();
    for (int64_t line = chunk_.first; line < chunk_.last; ++line) {
      const int64_t h = line % s_.out[1], d = line / s_.out[1] % s_.out[0], n = line / (s_.out[1] * s_.out[0]);
      for (int64_t td = 0; td < s_.kernel[0]; ++td)
        for (int64_t th = 0; th < s_.kernel[1]; ++th) {
          const int64_t sd = o_.axis[0].source(d, td), sh = o_.axis[1].source(h, th);
          *origin++ = !plan_.padded() && (sd < 0 || sh < 0) ? nullptr : lines_.line(n, sd, sh);
        }
    }
    b_offsets_.resize(chunk_.lines());
    for (int64_t l = 0; l < chunk_.lines(); ++l) b_offsets_[l] = l * words();
  }

  // A tile of rows with panel j: `count` runs of `depth` pixels, added to the totals from `row` on.
  void multiply(int64_t height, int64_t count, int64_t depth, const W* const* a, int64_t a_offset, int64_t a_step,
                const int64_t* b_pixels, W* row, int64_t step, bool accumulate, int64_t j) {
    const auto [b, ldb] = columns_at(j);
    int64_t offsets[kSumLength];
    for (int64_t l = 0; l < count; ++l) offsets[l] = b_pixels[l] * ldb;
    GemmTile<T> tile{.taps = count,
                     .depth = depth,
                     .a = a,
                     .a_offset = a_offset,
                     .a_step = a_step,
                     .b = b,
                     .b_offsets = offsets,
                     .ldb = ldb,
                     .c = nullptr,
                     .cols = panels_.size(j),
                     .row_bias = nullptr,
                     .column_bias = nullptr,
                     .accumulate = accumulate};
    T* c[kMaxRows] = {};
    tile.c = c;
    if constexpr (kIsHalf<T>) {
      tile.partial = row + panels_.begin(j), tile.partial_step = step, tile.unfinished = true;
    } else {
      for (int64_t r = 0; r < height; ++r) c[r] = row + r * step + panels_.begin(j);
      if (ahead_ < end_ahead_) tile.next = ahead_;
    }
    o_.stored.gemm[height - 1](tile);
    if (ahead_) ahead_ += count * depth * height;
    if (ahead_ >= end_ahead_) ahead_ = x_ahead_, end_ahead_ = x_end_, x_ahead_ = nullptr;
  }

  // f(row, height, panel): tiles of rows with panels of columns. A panel is used for all tiles, unless so few pixels are
  // summed that the time goes into writing; then lines of the result are written from beginning to end.
  template <typename F>
  void each_product(int64_t rows, const F& f) const {
    if (chunk_.pixels() * columns_ * static_cast<int64_t>(sizeof(W)) <= kFewBytesOfColumns)
      return each_tile(rows, kernels_.rows, [&](int64_t row, int64_t height) {
        for (int64_t j = 0; j < panels_.count; ++j) f(row, height, j);
      });
    for (int64_t j = 0; j < panels_.count; ++j)
      each_tile(rows, kernels_.rows, [&](int64_t row, int64_t height) { f(row, height, j); });
  }

  // x packed as [tile][pixel][row of the tile], read in the order of memory.
  void multiply_packed_tiles(int64_t b0, int64_t block) {
    if constexpr (!kIsHalf<T>) {
      constexpr int64_t kAtOnce = 16;
      const int64_t pixels = chunk_.pixels();
      const T* const first = origins_[0] + chunk_.begin * lines_.next();
      for (int64_t p = 0; p < pixels; p += kAtOnce)
        each_tile(block, kernels_.rows, [&](int64_t row, int64_t height) {
          kernels_.copy_rows(first + p * lines_.next() + row, lines_.next(), std::min(kAtOnce, pixels - p), height,
                             strip_ + row * pixels + p * height, height);
        });
      const T* rows_of_tile[kMaxRows];
      for (int64_t r = 0; r < kMaxRows; ++r) rows_of_tile[r] = strip_ + r;
      each_product(block, [&](int64_t row, int64_t height, int64_t j) {
        multiply(height, 1, pixels, rows_of_tile, row * pixels, height, b_offsets_.data(),
                 totals_ + (b0 + row) * row_step_ * ld_, row_step_ * ld_, !first_chunk_, j);
      });
    }
  }

  // Panel j, whose lanes belong to several groups.
  void multiply_lanes(int64_t j) {
    pack(j);
    const int64_t first = (k0_ + panels_.begin(j)) / s_.out_per_group, lines = chunk_.lines();
    start_lines(first * rows_, panels_.size(j) / s_.out_per_group * rows_);
    pointers_.resize(lines * plan_.taps);
    for (int64_t l = 0; l < lines; ++l)
      for (int64_t t = 0; t < plan_.taps; ++t)
        pointers_[l * plan_.taps + t] =
            origins_[l * plan_.line_taps + t / s_.kernel[2]] + lines_.begin(t % s_.kernel[2]);
    for (int64_t l = 0; l < lines; ++l) b_offsets_[l] *= kernels_.lanes;
    kernels_.lanes_of_groups({.runs = lines,
                              .depth = chunk_.length(),
                              .taps = plan_.taps,
                              .channels = rows_,
                              .group_cols = s_.out_per_group,
                              .a = pointers_.data(),
                              .a_step = lines_.next(),
                              .b = panels_data_,
                              .b_offsets = b_offsets_.data(),
                              .ldb = kernels_.lanes,
                              .c = totals_ + panels_.begin(j),
                              .c_tap = tap_step_ * ld_,
                              .c_channel = row_step_ * ld_,
                              .cols = panels_.size(j),
                              .accumulate = !first_chunk_,
                              .next = ahead_});
    if (ahead_) ahead_ += chunk_.pixels() * ceil_div(plan_.taps, 3) * (64 / sizeof(W));
    if (ahead_ >= end_ahead_) ahead_ = x_ahead_, end_ahead_ = x_end_, x_ahead_ = nullptr;
  }

  // Rows of a tile are any (in channel, tap).
  void multiply_folded() {
    const int64_t all = rows_ * plan_.taps, lines = chunk_.lines();
    pointers_.resize(all * lines);
    each_tile(all, kernels_.rows, [&](int64_t row, int64_t height) {
      const W** const list = pointers_.data() + row * lines;
      for (int64_t r = 0; r < height; ++r) {
        const int64_t c = o_.taps_inside ? (row + r) / plan_.taps : (row + r) % rows_;
        const int64_t t = o_.taps_inside ? (row + r) % plan_.taps : (row + r) / rows_;
        const int64_t at = c * lines_.row + lines_.begin(t % s_.kernel[2]);
        for (int64_t l = 0; l < lines; ++l)
          list[l * height + r] = origins_[l * plan_.line_taps + t / s_.kernel[2]] + at;
      }
    });
    each_product(all, [&](int64_t row, int64_t height, int64_t j) {
      multiply(height, lines, words(), pointers_.data() + row * lines, 0, lines_.next(), b_offsets_.data(),
               totals_ + row * ld_, ld_, !first_chunk_, j);
    });
  }

  // Rows are in channels [b0, b0 + block) of one tap: runs of pixels inside.
  void multiply_tap(int64_t t, int64_t b0, int64_t block) {
    const GatherAxis& w = o_.axis[2];
    const int64_t tw = t % s_.kernel[2], line_tap = t / s_.kernel[2], length = words();
    const bool whole = plan_.padded();
    const int64_t w0 = whole ? chunk_.begin : std::clamp(w.first_inside(tw), chunk_.begin, chunk_.end);
    const int64_t w1 = whole ? chunk_.end : std::clamp(w.last_inside(tw), w0, chunk_.end);
    W* const of_tap = totals_ + (t * tap_step_ + b0 * row_step_) * ld_;
    // Two lists of pointers, for tiles of either height.
    const int64_t tiles = ceil_div(block, kernels_.rows), low = block / tiles, high = low + (block % tiles > 0);
    pointers_.resize(chunk_.lines() * (low + high));
    b_offsets_.clear();
    const W **to_low = pointers_.data(), **to_high = to_low + chunk_.lines() * low;
    const W *front = nullptr, *expected = nullptr;
    bool joined = w0 == chunk_.begin && w1 == chunk_.end;  // all runs are one
    for (int64_t l = 0; l < chunk_.lines(); ++l) {
      const W* const line = origins_[l * plan_.line_taps + line_tap];
      if (!line || w0 == w1) continue;
      const W* const run = line + lines_.begin(tw) + (w0 - chunk_.begin) * lines_.next();
      if (front) joined = joined && run == expected && b_offsets_.back() == (l - 1) * length;
      if (!front) front = run;
      expected = run + length * lines_.next();
      b_offsets_.push_back(l * length + w0 - chunk_.begin);
      for (int64_t r = 0; r < low; ++r) *to_low++ = run + r * lines_.row;
      if (high > low)
        for (int64_t r = 0; r < high; ++r) *to_high++ = run + r * lines_.row;
    }
    const auto runs = static_cast<int64_t>(b_offsets_.size());
    const int64_t count = joined ? std::min<int64_t>(runs, 1) : runs;
    const int64_t depth = joined ? runs * length : ceil_div(w1 - w0, plan_.pair);
    if (runs == 0 && first_chunk_)
      for (int64_t r = 0; r < block; ++r) std::fill_n(of_tap + r * row_step_ * ld_, columns_, W(0));
    const W* const* const of_low = pointers_.data();
    const W* const* const of_high = of_low + chunk_.lines() * low;
    if (runs > 0)
      each_product(block, [&](int64_t row, int64_t height, int64_t j) {
        multiply(height, count, depth, height == low ? of_low : of_high, row * lines_.row, lines_.next(),
                 b_offsets_.data(), of_tap + row * row_step_ * ld_, row_step_ * ld_, !first_chunk_, j);
      });
    if (!o_.complete) multiply_outside(tw, line_tap, w0, w1, block, of_tap);
  }

  // The pixels of a tap that read elsewhere than [w0, w1) of a line, one by one.
  void multiply_outside(int64_t tw, int64_t line_tap, int64_t w0, int64_t w1, int64_t block, W* of_tap) {
    outside_.clear(), outside_offsets_.clear();
    const bool zeros = o_.axis[2].mode == PaddingMode::kZeros;
    for (int64_t l = 0; l < chunk_.lines(); ++l)
      for (int64_t w = chunk_.begin; w < chunk_.end; ++w) {
        const W* const line = origins_[l * plan_.line_taps + line_tap];
        if (line && w >= w0 && w < w1) continue;
        outside_offsets_.push_back(l * chunk_.length() + w - chunk_.begin);
        for (int64_t r = 0; r < kernels_.rows; ++r)
          outside_.push_back(zeros ? zero_ : line + o_.axis[2].source(w, tw) * lines_.step + r * lines_.row);
      }
    const auto pixels = static_cast<int64_t>(outside_offsets_.size());
    if (pixels == 0) return;
    each_product(block, [&](int64_t row, int64_t height, int64_t j) {
      pointers_.resize(pixels * height);
      for (int64_t p = 0; p < pixels; ++p)
        std::copy_n(outside_.data() + p * kernels_.rows, height, pointers_.data() + p * height);
      multiply(height, pixels, 1, pointers_.data(), zeros ? 0 : row * lines_.row, 1, outside_offsets_.data(),
               of_tap + row * row_step_ * ld_, row_step_ * ld_, true, j);
    });
  }

  static constexpr int64_t kFewBytesOfColumns = 16 << 10;

  const Operands<T>& o_;
  const ConvShape& s_;
  const Plan& plan_;
  const Kernels<W>& kernels_;
  W *const panels_data_, *const strip_, *const thread_totals_, *const zero_;
  Lines<T> lines_;
  std::vector<const W*> origins_, pointers_, outside_;
  std::vector<int64_t> b_offsets_, outside_offsets_;
  // Of the task: its rows and columns, and its totals, at row, tap 0.
  int64_t group_ = 0, c0_ = 0, rows_ = 0, k0_ = 0, columns_ = 0;
  Panels panels_{0, 1, 1};
  W* totals_ = nullptr;
  int64_t ld_ = 0, row_step_ = 0, tap_step_ = 0;
  // Of the chunk, and what is fetched meanwhile.
  Chunk chunk_{};
  bool first_chunk_ = false;
  const W *ahead_ = nullptr, *end_ahead_ = nullptr, *x_ahead_ = nullptr, *x_end_ = nullptr;
};

// The slabs are added up, a few rows at a time.
template <typename T>
void add_slabs(const Operands<T>& o) {
  constexpr int64_t kRowsAtOnce = 8;
  const Plan& plan = o.plan;
  const ConvShape& s = o.problem.s;
  const int64_t pieces = o.taps_inside ? ceil_div(plan.rows, kRowsAtOnce) : 1;
  const int64_t row_step = o.taps_inside ? plan.taps : 1, tap_step = o.taps_inside ? 1 : plan.rows;
  const double macs = static_cast<double>(o.split.slab) * plan.slabs / (plan.groups * pieces);
  parallel_tasks(plan.groups * pieces, macs, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / pieces, row = plan.rows * (i % pieces) / pieces;
      const int64_t rows = plan.rows * (i % pieces + 1) / pieces - row;
      Word<T>* const sums = o.slabs + (group * plan.rows + row) * plan.taps * plan.columns;
      o.kernels.add_rows(sums, sums + o.split.slab, o.split.slab, plan.slabs - 1, rows * plan.taps * plan.columns);
      write(s, o.stored, sums, plan.columns, row_step, tap_step, rows, plan.columns,
            o.gw + group * o.problem.weight_group + row * s.weight_stride[1]);
    }
  });
}

// f(problem) for the problem as it is computed first, and then as it may have to be computed.
template <typename T, typename F>
void each_problem(const ConvShape& s, const Kernels<T>& kernels, const F& f) {
  for (const bool may_mirror : {true, false}) {
    const Problem problem(s, kernels.rows, kernels.lanes, kernels.vectors, kernels.pair, may_mirror);
    if (problem.mirrored() && !Plan(problem, sizeof(Word<T>), kernels.lanes, kernels.pair).folded) continue;
    if (f(problem)) return;
  }
}

template <typename T>
void run(const ConvShape& s, const Problem& problem, const ConvPointers& p, Word<T>* workspace, int threads) {
  const Kernels<T>& kernels = dense_kernels<T>();
  const Plan plan(problem, sizeof(Word<T>), kernels.lanes, kernels.pair);
  const Split split(problem, plan, kernels.rows, kernels.lanes, kernels.vectors, sizeof(Word<T>), threads);
  BiasSums<T> bias(s, p, plan.slabs);
  const Operands<T> operands(problem, plan, split, p, bias, workspace, threads);
  parallel_tasks(split.tasks, problem.s.macs() / split.tasks, [&](int64_t begin, int64_t end) {
    Worker<T> worker(operands);
    for (int64_t task = begin; task < end; ++task) worker.run(task);
  });
  if (plan.slabs > 1) add_slabs(operands);
  bias.store();
}

}  // namespace

const char* implicit_gemm_backward_weight_decline(const ConvShape& s) {
  if (!is_floating_point(s.dtype)) return "only floating-point types";
  if (s.batch == 0 || s.in_pixels() == 0 || s.out_pixels() == 0) return "nothing to sum over";
  if (s.in_per_group == 0 || s.out_per_group == 0) return "nothing to sum over";
  if (s.taps() > kMaxTaps) return "more than 16384 taps";
  if (is_half(s.dtype) && s.padding_mode != PaddingMode::kZeros && s.in[2] > kMaxCopied)
    return "lines above 65536 values, 16 bits each";
  return nullptr;
}

int64_t implicit_gemm_backward_weight_workspace(const ConvShape& s, int threads) {
  return with_type(s.dtype, [&](auto zero) {
    using W = Word<decltype(zero)>;
    const Kernels<decltype(zero)>& kernels = dense_kernels<decltype(zero)>();
    int64_t words = 0;
    each_problem(s, kernels, [&](const Problem& problem) {
      const Plan plan(problem, sizeof(W), kernels.lanes, kernels.pair);
      const Split split(problem, plan, kernels.rows, kernels.lanes, kernels.vectors, sizeof(W), threads);
      words = std::max(words, threads * split.of_thread() + plan.slabs * split.slab);
      return false;
    });
    return static_cast<int64_t>(sizeof(W)) * words;
  });
}

void implicit_gemm_backward_weight(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  with_type(s.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T>& kernels = dense_kernels<T>();
    each_problem(s, kernels, [&](const Problem& problem) {
      run<T>(s, problem, p, static_cast<Word<T>*>(workspace), threads);
      return !problem.mirrored() || all_finite(s, static_cast<const T*>(p.result));
    });
  });
}

}  // namespace myconv::cpu
