// What the depthwise microkernels (depthwise.inc) are told. Plain structs, as microkernels.h says.
#pragma once

#include <cstdint>

#include "cpu/stored.h"

namespace myconv::cpu {

inline constexpr int kMostIndices = 16;  // lanes of any ISA
inline constexpr int kFew = 4;           // columns that are loaded from the other end of a line

// A tap that is walked one at a time, and where it reads.
struct DepthwiseTap {
  int64_t offset;  // added to every address; negative: the tap reads nothing but zeros
  int64_t row;     // added to the index of a row
  int64_t column;  // NCHW: the column of a line that result column 0 reads
  int64_t unit;    // added to the index of a unit
  int64_t weight;  // offset of its first weight
  bool paired;     // NCHW with stride 2: whether the next tap of the line, served by the same loads, is there
  int64_t move;    // NCHW: which of the moves of a vector is its
};

// A vector whose lanes are not neighbours in memory: it is loaded from elsewhere, and its lanes are put in order.
//   NCHW   at the ends of a line that a padding mode goes on; one for each tap along it, or each pair of taps
//   NHWC   channels that several results are made of (a channel multiplier, groups); one for each vector of channels, or
//          for each of the channels that are summed up
struct DepthwiseMove {
  bool moves;                      // if not, the vector is as it lies
  int64_t at;                      // the first column (channel) that is loaded
  int64_t first, last;             // the lanes that are loaded; with stride 2, of two vectors
  int64_t wrap;                    // circular: 0, or the step to a few columns at the line's other end,
  int64_t wrap_first, wrap_last;   // and the lanes that come from there
  int32_t index[2][kMostIndices];  // where each lane (there: such a lane) comes from; with stride 2, of two vectors
};

// Tiles of R results along one axis, whose units are lines (NCHW) or pixels (NHWC). K taps along that axis share what is
// loaded; all other taps are walked. For each list l and each result i < count:
//
//   to[l][i] = sum over walked taps t and k < K of  weight[t.weight + k * weight_step]
//                * from[t.offset + rows[t.row + l * row_step] + units[t.unit + i * unit_step + k]]
//              + (accumulate ? to[l][i] : 0) + bias
//
//   NCHW   a vector holds columns of one line; weights and bias are single values. Columns outside [0, extent) of what
//          is read are zeros. There is one list. A plane is a channel.
//   NHWC   a vector holds channels, and a list is a line of the result; weights and bias are vectors. A plane is a
//          vector of channels. Of groups a result sums so many channels: a plane has weights and moves for each of them.
//
// Stride 2 is undone (spread) by tiles whose results are twice as many as their units; tap k serves every other one:
//
//   to[l][i] = sum over t and k of  weight[t.weight + k * weight_step] * from[.. + units[t.unit + (i - k) / 2 + K / 2]]
//              for even i - k
//
//   NCHW   the first even_taps taps make the even columns of a line and the others the odd ones
//   NHWC   a list is a line of all pixels
//
// backward_weight reads the same units, and gy where results would be:
//
//   sums[t.weight + k * weight_step][lane] += sum over l, i and vectors of a line of  to[l][i] * from[.. as above ..]
//
// All of it is done for each of a number of planes.
template <typename T>
struct DepthwiseTile {
  using W = Word<T>;
  int64_t planes, from_plane, weight_plane, bias_plane, to_plane;  // how many, and the steps from one to the next
  int64_t summed = 1;                                              // NHWC: channels of a group
  int64_t taps;
  const DepthwiseTap* tap;
  int64_t lists, row_step;
  const int64_t* rows;  // offsets; negative: in the padding
  int64_t count, unit_step;
  const int64_t* units;                      // as rows
  const int64_t *first_inside, *end_inside;  // the units between are equally far apart
  int64_t unit_size;                         // from one of them to the next
  const T* from;
  int64_t extent;
  const DepthwiseMove* moves;             // or nullptr. NCHW: [vector at an end][line_moves], NHWC: [plane][summed]
  int64_t line_moves, first_end, to_end;  // NCHW: the vectors before first_end and from to_end on are at an end
  int64_t before_line, behind_line;       // NCHW, kernels that roll: the columns that a padding mode puts there
  const W* weight;
  int64_t weight_step, pair_step;  // from one of the K to the next, and to the paired tap's
  const W* bias;                   // or nullptr
  T* to;
  int64_t list_step, to_step;
  int64_t length;    // columns, or channels of all planes
  bool rolls;        // whether kernels that roll may be used,
  int64_t in_order;  // NHWC: or, unless 0, those of large tensors; where stride 2 is undone, of so many units at a time
  bool past;         // NHWC, not of 16-bit types: whether these write whole, aligned vectors past the caches
  bool skip_zeros;   // the weights are finite: what lies in the padding adds nothing
  bool accumulate;   // not of 16-bit types
  int64_t
      ahead;     // 0, or fetch early: the step from a line of what is read to the next (NHWC: that the next list reads)
  int64_t line;  // NCHW, of the first unit
  int64_t even_taps, first_stored, end_stored;  // where stride 2 is undone; results outside are left alone
  int64_t first_list, end_list;                 // where it is undone along both axes: so are lines outside
  const T* gy;                                  // with the steps of `to`
  W* sums;
  int64_t sums_plane;
};

inline constexpr int kDepthwiseWidths = 6;                // K: 1, 3, 5, 7, 9, 11
inline constexpr int kDepthwiseRows[] = {1, 2, 4, 7, 8};  // R
inline constexpr int kSpreadWidths[] = {3, 5, 7};         // K, where stride 2 is undone
inline constexpr int kMaxWalkedTaps = 256;                // of one tile
inline constexpr int64_t kRolledTerms = 512;              // of backward_weight, a lane's in one sum

// 3 x 3 taps with stride 1 or 2 (depthwise_rolling.inc): all lists, planes and units of a tile, whose taps are the 3 of
// the axis that is walked; in NHWC the lines that they read follow one another. Null where there is none.
template <typename T>
struct RollingKernels {
  using Tile = void (*)(const DepthwiseTile<T>&);
  Tile lines[2], pixels[2], weight_lines[2], weight_pixels[2];  // [stride - 1]
  Tile spread_lines, spread_pixels;  // stride 2 undone; of pixels along both axes: a list is a pair of lines of results
  Tile pixels_in_order[2];           // depthwise_in_order.inc
};

template <typename T>
struct DepthwiseKernels {
  // [index of K][index of R]; of 16-bit types, null where they cannot be loaded by masks
  using Tile = void (*)(const DepthwiseTile<T>&);
  using Tiles = Tile[2][kDepthwiseWidths][5];  // [stride - 1], null where there is no such tile
  Tiles lines, pixels;
  Tile spread_lines[3][2], spread_pixels[3][2];  // of 2 results, and of the most:
  int most_spread_lines, most_spread_pixels;
  Tiles weight_lines, weight_pixels;
  RollingKernels<T> rolling;
};

}  // namespace myconv::cpu
