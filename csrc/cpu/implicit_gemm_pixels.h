// What both ways of implicit_gemm.cpp have in common: pixels of a phase and what they read, operands, and what it costs to
// call a kernel.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"

namespace myconv::cpu::implicit_gemm {

// What a run of pixels costs, in pixels of full tiles: a tile of few rows costs no less than one of four.
inline double run_cost(int64_t length, int64_t rows) {
  const int64_t tiles = ceil_div(length, rows);
  return std::max(static_cast<double>(length), 4.0 * static_cast<double>(tiles)) + 0.7 * static_cast<double>(tiles);
}

// A result pixel of a phase.
struct Pixel {
  int64_t n, d, h, w;
};

// sources[t * stride] = where tap t of this pixel is read.
template <typename T>
void pixel_sources(const Gather& g, const GatherPhase& phase, const Pixel& at, const T* from, const T* zeros,
                   const T** sources, int64_t stride) {
  const GatherAxis* a = phase.axis;
  const T* image = from + at.n * g.from_stride.batch;
  for (int64_t td = 0; td < a[0].taps(); ++td) {
    const int64_t d = a[0].source(at.d, td);
    for (int64_t th = 0; th < a[1].taps(); ++th) {
      const int64_t h = a[1].source(at.h, th);
      const T* line = image + d * g.from_stride.axis[0] + h * g.from_stride.axis[1];
      for (int64_t tw = 0; tw < a[2].taps(); ++tw, sources += stride) {
        const int64_t w = a[2].source(at.w, tw);
        *sources = d < 0 || h < 0 || w < 0 ? zeros : line + w * g.from_stride.axis[2];
      }
    }
  }
}

template <typename T>
T* result_pixel(const Gather& g, const GatherPhase& phase, const Pixel& at, T* to) {
  const GatherAxis* a = phase.axis;
  return to + at.n * g.to_stride.batch + (a[0].to_start + at.d * a[0].to_step) * g.to_stride.axis[0] +
         (a[1].to_start + at.h * a[1].to_step) * g.to_stride.axis[1] +
         (a[2].to_start + at.w * a[2].to_step) * g.to_stride.axis[2];
}

// The pixels of a tile by pointers, as they are multiplied: where they lie, or packed.
template <typename T>
class TileWords {
 public:
  TileWords(const Kernels<T>& kernels, int64_t channels, int64_t block_terms)
      : kernels_(kernels),
        channels_(channels),
        in_place_(reads_in_place(kernels, channels)),
        words_(in_place_ ? 0 : kernels.rows * block_terms) {}

  // Of `count` pixels: the channels of a block, from the group's first one on. `offset` is theirs in what is returned.
  const Word<T>* const* prepare(const T* const* pixels, int64_t count, int64_t group_channel, const Block& block,
                                int64_t& offset) {
    const int64_t first = block.channel * kernels_.pair;
    if (in_place_) {
      offset = (group_channel + first) / kernels_.pair;
      return reinterpret_cast<const Word<T>* const*>(pixels);
    }
    offset = 0;
    pointers_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      Word<T>* const to = words_.data() + i * block.channels;
      kernels_.copy_rows(pixels[i] + group_channel + first, 0, 1,
                         std::min(block.channels * kernels_.pair, channels_ - first), to, 0);
      pointers_[i] = to;
    }
    return pointers_.data();
  }

 private:
  const Kernels<T>& kernels_;
  const int64_t channels_;
  const bool in_place_;
  std::vector<Word<T>> words_;
  std::vector<const Word<T>*> pointers_;
};

template <typename T>
struct Operands {
  const T* from;
  const Word<T>* bias;
  T* to;
  const T* zeros;  // of a pixel
};

// What tiles by pointers have in common: all but what they read. `depth` is that of the whole sum.
template <typename T>
GemmTile<T> pointer_tile(const Gather& g, const Panels& panels, const Operands<T>& o, const Block& block, int64_t depth,
                         int64_t unit, const Word<T>* b, T* const* c, Word<T>* sums) {
  const int64_t panel = unit % panels.count, column = unit / panels.count * g.to_per_group + panels.begin(panel);
  return {.taps = block.taps,
          .depth = block.channels,
          .a = nullptr,
          .a_offset = 0,
          .a_step = 1,
          .b = b,
          .b_offsets = nullptr,
          .ldb = panels.width,
          .c = c,
          .cols = panels.size(panel),
          .row_bias = nullptr,
          .column_bias = o.bias ? o.bias + column : nullptr,
          .accumulate = block.start > 0,
          .partial = sums,
          .partial_step = panels.width,
          .unfinished = block.start + block.terms() < depth};
}

// A call of a kernel takes as long as this many terms of a pixel.
template <typename T>
double call_terms(const Kernels<T>& kernels, const Panels& panels) {
  constexpr double kCallCycles = 60;
  return kCallCycles * 2.0 * kernels.lanes / static_cast<double>(panels.width);
}

// How much longer a tile by pointers takes for having fewer sums than are begun before the first is done.
template <typename T>
double idle_sums(const Kernels<T>& kernels, const Panels& panels) {
  constexpr int64_t kSums = 8;
  int64_t cycles = 0;
  for (int64_t i = 0; i < panels.count; ++i)
    cycles += std::max(kSums, kernels.rows * ceil_div(panels.size(i), panels.lanes));
  return static_cast<double>(cycles) / static_cast<double>(kernels.rows * panels.vectors);
}

}  // namespace myconv::cpu::implicit_gemm
