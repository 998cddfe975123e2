// What forward and backward_input have in common: each result pixel gathers over taps.
//
//   forward           y[o]  = sum over t of  x[o * stride + t * dilation - pad] . w[t]
//   backward_input    gx[i] = sum over t of  gy[(i + pad - t * dilation) / stride] . w[t]     for exact divisions
//
// The exactness depends on i mod stride only. So the result pixels fall into stride_d x stride_h x stride_w phases,
// and in each phase every axis is a plain stride-1 gather with a subset of the taps:
//
//   phase f:  i = f + stride * j    reads  gy[j + offset_t]    for whole offset_t = (f + pad - t * dilation) / stride
//
// Nothing is scattered and no inserted zero is multiplied. forward has one phase with all taps.
#pragma once

#include <c10/util/SmallVector.h>

#include <algorithm>

#include "conv_shape.h"

namespace myconv::cpu {

// One axis of one phase: result position to_start + j * to_step, j < count, reads position j * from_step + offset[t].
struct GatherAxis {
  int64_t count, to_start, to_step, from_step, from_extent;
  c10::SmallVector<int64_t, 8> tap, offset;
  PaddingMode mode;

  int64_t taps() const { return static_cast<int64_t>(tap.size()); }
  // The position read, or -1 for a zero.
  int64_t source(int64_t j, int64_t t) const {
    return padded_index(source_index(j, from_step, 0, 0, -offset[t]), from_extent, mode);
  }
  // The j for which tap t reads inside [0, from_extent) are [first, last), as far as [0, count) goes.
  int64_t first_inside(int64_t t) const {
    return offset[t] >= 0 ? 0 : std::min(count, (-offset[t] - 1) / from_step + 1);
  }
  int64_t last_inside(int64_t t) const {
    return offset[t] >= from_extent ? 0 : std::min(count, (from_extent - 1 - offset[t]) / from_step + 1);
  }
  // Whether tap t reads nothing but zeros of the padding, whatever the position.
  bool is_idle(int64_t t) const { return mode == PaddingMode::kZeros && first_inside(t) >= last_inside(t); }
  // Whether position j of the result lies at position j of what is read: nothing moves along this axis.
  bool is_identity() const {
    return taps() == 1 && offset[0] == 0 && from_step == 1 && to_step == 1 && count == from_extent;
  }
};

struct GatherPhase {
  GatherAxis axis[3];
  int64_t pixels() const { return axis[0].count * axis[1].count * axis[2].count; }
  int64_t taps() const { return axis[0].taps() * axis[1].taps() * axis[2].taps(); }
};

// The gather seen from one side: "from" is what is read (x or gy), "to" what is written (y or gx).
struct Gather {
  int64_t batch, groups, from_per_group, to_per_group;
  int64_t from_extent[3], to_extent[3];
  ActivationStrides from_stride, to_stride;
  int64_t weight_to_stride, weight_from_stride, weight_axis_stride[3];
  int64_t weight_group_stride;  // from a group's first weight to the next one's
  c10::SmallVector<GatherPhase, 1> phases;

  int64_t from_pixels() const { return from_extent[0] * from_extent[1] * from_extent[2]; }
  int64_t to_pixels() const { return to_extent[0] * to_extent[1] * to_extent[2]; }
  // Of all taps of a phase, in order.
  c10::SmallVector<int64_t, 9> weight_tap_offsets(const GatherPhase& phase) const {
    c10::SmallVector<int64_t, 9> offsets;
    for (const int64_t d : phase.axis[0].tap)
      for (const int64_t h : phase.axis[1].tap)
        for (const int64_t w : phase.axis[2].tap)
          offsets.push_back(d * weight_axis_stride[0] + h * weight_axis_stride[1] + w * weight_axis_stride[2]);
    return offsets;
  }
  int64_t weight_tap_offset(const GatherPhase& phase, int64_t t) const {
    const GatherAxis* a = phase.axis;
    const int64_t w = t % a[2].taps(), h = t / a[2].taps() % a[1].taps(), d = t / (a[2].taps() * a[1].taps());
    return a[0].tap[d] * weight_axis_stride[0] + a[1].tap[h] * weight_axis_stride[1] +
           a[2].tap[w] * weight_axis_stride[2];
  }
};

inline GatherAxis forward_axis(const ConvShape& s, int d) {
  GatherAxis axis{s.out[d], 0, 1, s.stride[d], s.in[d], {}, {}, s.padding_mode};
  for (int64_t t = 0; t < s.kernel[d]; ++t) {
    axis.tap.push_back(t);
    axis.offset.push_back(source_index(0, s.stride[d], t, s.dilation[d], s.pad[d]));
  }
  return axis;
}

inline GatherAxis backward_input_axis(const ConvShape& s, int d, int64_t phase) {
  GatherAxis axis{
      (s.in[d] - phase - 1) / s.stride[d] + 1, phase, s.stride[d], 1, s.out[d], {}, {}, PaddingMode::kZeros};
  for (int64_t t = 0; t < s.kernel[d]; ++t) {
    const __int128 numerator = static_cast<__int128>(phase) + s.pad[d] - static_cast<__int128>(t) * s.dilation[d];
    if (numerator % s.stride[d] != 0) continue;
    axis.tap.push_back(t);
    axis.offset.push_back(static_cast<int64_t>(numerator / s.stride[d]));
  }
  return axis;
}

inline Gather make_gather(const ConvShape& s, Direction direction) {
  const bool forward = direction == Direction::kForward;
  Gather g;
  g.batch = s.batch;
  g.groups = s.groups;
  g.from_per_group = forward ? s.in_per_group : s.out_per_group;
  g.to_per_group = forward ? s.out_per_group : s.in_per_group;
  std::copy_n(forward ? s.in : s.out, 3, g.from_extent);
  std::copy_n(forward ? s.out : s.in, 3, g.to_extent);
  g.from_stride = activation_strides(s.layout, g.groups * g.from_per_group, g.from_extent);
  g.to_stride = activation_strides(s.layout, g.groups * g.to_per_group, g.to_extent);
  g.weight_to_stride = s.weight_stride[forward ? 0 : 1];
  g.weight_from_stride = s.weight_stride[forward ? 1 : 0];
  g.weight_group_stride = s.out_per_group * s.weight_stride[0];
  std::copy_n(s.weight_stride + 2, 3, g.weight_axis_stride);
  int64_t phases[3];
  for (int d = 0; d < 3; ++d) phases[d] = forward ? 1 : std::min(s.stride[d], s.in[d]);
  for (int64_t d = 0; d < phases[0]; ++d)
    for (int64_t h = 0; h < phases[1]; ++h)
      for (int64_t w = 0; w < phases[2]; ++w)
        if (forward)
          g.phases.push_back({{forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)}});
        else
          g.phases.push_back(
              {{backward_input_axis(s, 0, d), backward_input_axis(s, 1, h), backward_input_axis(s, 2, w)}});
  return g;
}

// Of all pairs of a position and a tap, the share that reads inside.
inline double share_inside(const GatherAxis& axis) {
  double inside = 0;
  for (int64_t t = 0; t < axis.taps(); ++t)
    inside += static_cast<double>(std::max<int64_t>(0, axis.last_inside(t) - axis.first_inside(t)));
  return inside / static_cast<double>(std::max<int64_t>(1, axis.taps() * axis.count));
}

// Leaves idle taps out of a gather. What they would add is 0 times a weight: nothing, if the weights are finite.
inline void drop_idle_taps(Gather& g) {
  for (GatherPhase& phase : g.phases)
    for (GatherAxis& axis : phase.axis) {
      GatherAxis kept = axis;
      kept.tap.clear();
      kept.offset.clear();
      for (int64_t t = 0; t < axis.taps(); ++t) {
        if (axis.is_idle(t)) continue;
        kept.tap.push_back(axis.tap[t]);
        kept.offset.push_back(axis.offset[t]);
      }
      axis = kept;
    }
}

// The share of the pairs of output and tap that do not read zeros of the padding, along the axes where whole tiles of
// pixels read zeros: depth, and those with a dilation.
inline double tiles_inside(const ConvShape& s) {
  if (s.padding_mode != PaddingMode::kZeros) return 1;
  double inside = 1;
  for (int d = 0; d < 3; ++d)
    if (s.kernel[d] > 1 && (d == 0 || s.dilation[d] > 1)) inside *= share_inside(forward_axis(s, d));
  return inside;
}

// Whether much of the work of a convolution is on zeros of the padding: the first or the last tap of an axis is idle, or
// with a dilation, three in ten or more of all pairs are, or so many planes that those left, in vectors of their own, are
// fewer.
inline bool works_on_padding(const ConvShape& s) {
  if (s.padding_mode != PaddingMode::kZeros) return false;
  for (int d = 0; d < 3; ++d) {
    const double reach = static_cast<double>(s.kernel[d] - 1) * s.dilation[d], pad = s.pad[d];
    if (static_cast<double>(s.out[d] - 1) * s.stride[d] < pad || reach - pad >= s.in[d]) return true;
  }
  constexpr double kTiles = 0.7, kPlanes = 0.9;
  constexpr int64_t kLanes = 16;
  const int64_t pixels = s.out[1] * s.out[2];
  const double planes = s.kernel[0] > 1 ? share_inside(forward_axis(s, 0)) : 1;
  const double lanes = static_cast<double>(ceil_div(pixels, kLanes) * s.out[0]) /
                       static_cast<double>(std::max<int64_t>(1, ceil_div(pixels * s.out[0], kLanes)));
  return tiles_inside(s) < kTiles || planes * lanes < kPlanes;
}

}  // namespace myconv::cpu
