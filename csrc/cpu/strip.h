// Padded strips (NCHW): the lines of one plane that a block of result lines reads, copied once with their padding.
//
//   strip  [td][line][residue][position]
//
// A residue is a class of positions w mod stride, so that what a strided tap reads for neighbouring results is
// contiguous. In a strip every tap of every result line is a constant offset from where that line begins.
#pragma once

#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/microkernels.h"

namespace myconv::cpu {

inline constexpr int64_t kStripBytes = 256 << 10;  // what is aimed at for all strips in use at a time: L2

// The padded strip of one phase, of about the given number of bytes.
struct StripPlan {
  int64_t low[3] = {0, 0, 0};              // smallest offset of each axis
  int64_t reach[3] = {1, 1, 1};            // largest - smallest + 1
  int64_t residues, span, pitch;           // of a line: classes, positions of a class, both together
  int64_t block_lines, strip_lines, size;  // result lines of a block, lines of its strip, elements of the strip

  StripPlan(const GatherPhase& phase, int64_t element_size, int64_t bytes) {
    for (int d = 0; d < 3; ++d) {
      const auto& offset = phase.axis[d].offset;
      if (offset.empty()) continue;
      const auto [least, most] = std::minmax_element(offset.begin(), offset.end());
      low[d] = *least, reach[d] = *most - *least + 1;
    }
    const GatherAxis& w = phase.axis[2];
    const GatherAxis& h = phase.axis[1];
    residues = std::min(w.from_step, reach[2]);
    span = w.count + (reach[2] - 1) / w.from_step;
    pitch = residues * span;
    const int64_t volumes = std::max<int64_t>(1, phase.axis[0].taps());
    const int64_t fit = bytes / element_size / volumes / std::max<int64_t>(pitch, 1);
    block_lines = std::clamp<int64_t>((fit - reach[1]) / h.from_step + 1, 1, std::max<int64_t>(h.count, 1));
    strip_lines = (block_lines - 1) * h.from_step + reach[1];
    size = volumes * strip_lines * pitch;
  }

  // offsets[tap] of a result line, from where its line begins in the strip.
  void tap_offsets(const GatherPhase& phase, int64_t* offsets) const {
    const GatherAxis* a = phase.axis;
    for (int64_t td = 0; td < a[0].taps(); ++td)
      for (int64_t th = 0; th < a[1].taps(); ++th)
        for (int64_t tw = 0; tw < a[2].taps(); ++tw) {
          const int64_t w = a[2].offset[tw] - low[2];
          *offsets++ =
              (td * strip_lines + a[1].offset[th] - low[1]) * pitch + w % a[2].from_step * span + w / a[2].from_step;
        }
  }
};

// The runs that fill the strip for result lines [h, h + lines) of depth d: the same for every plane, so they are found
// once a call and a strip is then one call of the pack microkernel.
using StripRuns = c10::SmallVector<Segment, 48>;

inline void strip_runs(const GatherPhase& phase, const StripPlan& plan, int64_t d, int64_t h, int64_t lines,
                       StripRuns& runs) {
  const GatherAxis* a = phase.axis;
  const int64_t line_length = a[2].from_extent, step = a[2].from_step;
  const auto run = [&](int64_t source, int64_t target, int64_t length, int64_t first, int64_t last) {
    runs.push_back({source, step, static_cast<int32_t>(target), static_cast<int32_t>(length),
                    static_cast<int32_t>(first), static_cast<int32_t>(last)});
  };
  for (int64_t td = 0; td < a[0].taps(); ++td) {
    const int64_t from_d = a[0].source(d, td);
    for (int64_t l = 0; l < (lines - 1) * a[1].from_step + plan.reach[1]; ++l) {
      const int64_t from_h = padded_index(h * a[1].from_step + plan.low[1] + l, a[1].from_extent, a[1].mode);
      int64_t target = (td * plan.strip_lines + l) * plan.pitch;
      if (from_d < 0 || from_h < 0) {
        run(0, target, plan.pitch, 0, 0);
        continue;
      }
      const int64_t line = (from_d * a[1].from_extent + from_h) * line_length;
      for (int64_t r = 0; r < plan.residues; ++r, target += plan.span) {
        // Position i of this residue is base + i * step; those in [first, last) lie in the line.
        const int64_t base = plan.low[2] + r;
        const int64_t first = base >= 0 ? 0 : std::min(plan.span, (-base - 1) / step + 1);
        const int64_t last =
            base >= line_length ? first : std::clamp((line_length - 1 - base) / step + 1, first, plan.span);
        if (a[2].mode == PaddingMode::kZeros) {
          run(line + base, target, plan.span, first, last);
          continue;
        }
        run(line + base + first * step, target + first, last - first, 0, last - first);
        for (int64_t i = 0; i < plan.span; ++i)
          if (i < first || i >= last) {
            // What no tap reads (the end of a residue) may lie beyond any padding mode's reach.
            const int64_t source = padded_index(base + i * step, line_length, a[2].mode);
            run(line + source, target + i, 1, 0, source >= 0 && source < line_length);
          }
      }
    }
  }
}

}  // namespace myconv::cpu
