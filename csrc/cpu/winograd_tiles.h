// Tiles of Winograd's algorithms: where they lie along an axis, what they read, and its way into the transforms.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/gather.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/microkernels.h"

namespace myconv::cpu {

inline constexpr int64_t kMostTilePixels = 81;  // that a tile reads
inline constexpr int64_t kStripChannels = 64;   // NCHW: channels that are transposed at a time

// The transforms for a shape, of small tiles or of large ones; nullptr if there are none. Those of the gradient of the
// weight are the forward ones.
inline const WinogradKernels<float>* find_transforms(const Kernels<float>& kernels, const ConvShape& s,
                                                     Direction direction, bool small) {
  const bool adjoint = direction == Direction::kBackwardInput;
  for (const WinogradKernels<float>& t : kernels.winograd) {
    bool fits = t.exact == small;
    for (int d = 0; d < 2; ++d) {
      const int64_t stride = s.stride[d + 1], read = adjoint ? 1 : stride, written = adjoint ? stride : 1;
      fits &= t.taps[d] == s.kernel[d + 1];
      fits &= t.taps[d] == 1
                  ? written == 1
                  : t.stride == read && t.result_stride == written && (stride == 1 || s.dilation[d + 1] == 1);
    }
    if (fits) return &t;
  }
  return nullptr;
}

// An image whose kernel has tiles along its lines, and none across them, is a sum over the lines of the kernel: H takes the
// place of the third axis, whose frames are lines.
inline ConvShape lines_as_frames(ConvShape s, Direction direction) {
  const bool is_image = s.in[0] == 1 && s.out[0] == 1 && s.kernel[0] == 1 && s.pad[0] == 0;
  if (!is_image || s.kernel[1] == 1 || find_transforms(microkernels().f32, s, direction, /*small=*/false)) return s;
  for (int64_t* const axis : {s.in, s.out, s.kernel, s.stride, s.pad, s.dilation, s.weight_stride + 2})
    std::swap(axis[0], axis[1]);
  return s;
}

// Groups with few channels that are read, transformed and written as one: all that share a vector, and where they fill
// it, several vectors.
struct Together {
  int64_t groups = 1, vectors = 1;

  Together() = default;
  Together(int64_t all, int64_t from, int64_t to) {
    constexpr int64_t kMostVectors = 4;
    constexpr double kPass = 0.35;  // of the time of a vector, whatever their number
    const int64_t lanes = microkernels().f32.lanes, in_vector = std::min(all, lanes / std::max({int64_t{1}, from, to}));
    if (in_vector == 0) return;
    const auto cost = [&](int64_t v) { return static_cast<double>(ceil_div(all, v * in_vector)) * (v + kPass); };
    if (in_vector * from == lanes && in_vector * to == lanes)
      for (int64_t v = 2; v <= kMostVectors && v * in_vector <= all; v *= 2)
        if (cost(v) < cost(vectors)) vectors = v;
    groups = vectors * in_vector;
  }
};

// Groups [first, first + count), in whole numbers of those taken together: where some are left, the last ones once more.
// What is computed twice is the same.
struct GroupRange {
  int64_t first, count;
};
inline c10::SmallVector<GroupRange, 2> group_ranges(int64_t all, const Together& together) {
  const int64_t left = all % together.groups;
  c10::SmallVector<GroupRange, 2> ranges{{0, all - left}};
  if (left > 0) ranges.push_back({all - together.groups, together.groups});
  return ranges;
}

// Where the lanes of a vector, that hold `to` results of each group, find channel k of the `from` of their own group.
struct GroupLanes {
  int32_t lane[kMostIndices][kMostIndices] = {};

  GroupLanes(const Together& together, int64_t from, int64_t to) {
    if (together.groups == 1) return;
    const int64_t in_vector = together.groups / together.vectors;
    for (int64_t k = 0; k < from; ++k)
      for (int64_t l = 0; l < in_vector * to; ++l) lane[k][l] = static_cast<int32_t>(l / to * from + k);
  }
};

// Tiles along an axis, and what they read. Positions count from the first one that is read.
struct TileAxis {
  int64_t out, in, count;                 // results of a tile, positions it reads; results of the axis
  int64_t stride, result_stride;          // results that lie result_stride apart read what lies stride apart
  int64_t dilation;                       // between the results of a tile, and between what it reads
  c10::SmallVector<int64_t, 64> first;    // result of each tile
  c10::SmallVector<int64_t, 64> start;    // and the first position that it reads
  c10::SmallVector<int64_t, 128> source;  // of each position; -1 is a zero
  c10::SmallVector<int64_t, 8> tap;       // of the weight, in the order of positions

  // Tiles of different remainders by the dilation overlap: in_order has them follow each other by their first result,
  // else tiles of one remainder follow each other.
  TileAxis(const GatherAxis& a, int64_t results, int64_t reads, bool in_order)
      : TileAxis(results, reads, a.count, a.from_step) {
    tap = a.tap;
    if (a.taps() > 1) dilation = std::abs(a.offset[1] - a.offset[0]);
    const int64_t low = std::min(a.offset.front(), a.offset.back());
    if (low < a.offset.front()) std::reverse(tap.begin(), tap.end());
    const int64_t remainders = std::min(dilation, count);
    if (in_order) {
      for (int64_t start = 0; start < count; start += out * dilation)
        for (int64_t r = 0; r < remainders && start + r < count; ++r) first.push_back(start + r);
    } else {
      for (int64_t r = 0; r < remainders; ++r)
        for (int64_t start = r; start < count; start += out * dilation) first.push_back(start);
    }
    set_sources([&](int64_t p) { return padded_index(p + low, a.from_extent, a.mode); }, a.from_extent);
  }
  // backward_input with stride 2 of an axis of s. Tiles begin at a result of the middle tap: 0, or one before it.
  static TileAxis of_stride(const ConvShape& s, int d, int64_t results, int64_t reads) {
    TileAxis axis(results, reads, s.in[d], 1);
    const int64_t start = s.pad[d] % 2 == 0 ? -1 : 0, low = (start + s.pad[d] - 1) / 2;
    axis.result_stride = 2;
    for (int64_t at = start; at < axis.count; at += axis.out) axis.first.push_back(at);
    for (int64_t t = 0; t < s.kernel[d]; ++t) axis.tap.push_back(t);
    axis.set_sources([&](int64_t p) { return p + low; }, s.out[d]);
    return axis;
  }
  // The same tiles, that read what are their results here.
  TileAxis of_results() const {
    TileAxis axis = *this;
    axis.in = out, axis.stride = axis.result_stride = 1;
    axis.set_sources([&](int64_t p) { return p + first[0]; }, count);
    return axis;
  }
  int64_t tiles() const { return static_cast<int64_t>(first.size()); }
  int64_t result(int64_t first_result, int64_t i) const { return first_result + i * dilation; }
  bool is_result(int64_t at) const { return at >= 0 && at < count; }
  // Position j of those that a tile reads.
  int64_t position(int64_t tile, int64_t j) const { return start[tile] + j * dilation; }
  int64_t last_position(int64_t tile) const { return position(tile, in - 1); }
  // Positions that a tile shares with the one before.
  int64_t shared(int64_t tile) const {
    if (tile == 0 || tile >= tiles() || first[tile] - first[tile - 1] != out * dilation) return 0;
    return std::max<int64_t>(0, in - out / result_stride * stride);
  }

 private:
  TileAxis(int64_t results, int64_t reads, int64_t all, int64_t step)
      : out(results), in(reads), count(all), stride(step), result_stride(1), dilation(1) {}

  // The last tile may reach further than any result, and than any padding mode.
  template <typename F>
  void set_sources(const F& source_of, int64_t extent) {
    source.clear(), start.clear();
    for (const int64_t at : first) start.push_back((at - first[0]) / result_stride * stride);
    const int64_t last = *std::max_element(start.begin(), start.end()) + (in - 1) * dilation;
    for (int64_t p = 0; p <= last; ++p) {
      const int64_t at = source_of(p);
      source.push_back(at >= 0 && at < extent ? at : -1);
    }
  }
};

// From one position to the next. A line is added, or two: steps that are multiples of 2 KiB would put all positions into
// the same few sets of the cache.
constexpr int64_t position_step(int64_t elements) {
  constexpr int64_t line = 16, sets = 512;
  return elements + ((elements + line) % sets == 0 ? 2 * line : line);
}

// A rectangle of tiles of one frame of one image.
struct TileRectangle {
  int64_t image, frame, h0, h1, w0, w1;
  int64_t count() const { return (h1 - h0) * (w1 - w0); }
};

// Calls f(rectangle, tiles before it) for the rectangles that tiles [first, last) of all images are made of.
template <typename F>
void each_rectangle(const TileAxis& h, const TileAxis& w, int64_t frames, int64_t first, int64_t last, const F& f) {
  const int64_t tiles_w = w.tiles(), of_frame = h.tiles() * tiles_w;
  for (int64_t tile = first; tile < last;) {
    const int64_t frame = tile / of_frame, in_frame = tile % of_frame;
    const int64_t row = in_frame / tiles_w, column = in_frame % tiles_w, left = last - tile;
    TileRectangle r{frame / frames, frame % frames, row, row + 1, column, std::min(tiles_w, column + left)};
    if (column == 0 && left >= tiles_w) r.h1 = row + std::min(left / tiles_w, h.tiles() - row);
    f(r, tile - first);
    tile += r.count();
  }
}

// A tile's transform, of values as they lie or of float32 ones in a strip.
template <typename T>
using TileTransform = void (*)(const T* const* pixels, int64_t channels, float* to, int64_t position_step);

// data[channel / panel][position][tile][channel % panel]
struct TransformedTiles {
  float* data;
  int64_t panel, panel_step, position_step, tile_step;
};

template <typename T>
struct TileReader {
  const TileAxis &h, &w;
  TileTransform<T> of_stored;
  TileTransform<float> of_strip;
  const Kernels<T>& stored;
  bool channels_last;
  const int64_t (&stride)[3];  // of the pixels
  int64_t plane;               // from one channel to the next
  const T* zeros;

  // Elements of the strip that up to `tiles` tiles take: whole tile rows, or a piece of one.
  static int64_t strip_size(const TileAxis& h, const TileAxis& w, int64_t tiles, int64_t channels) {
    const int64_t columns = std::min(tiles, w.tiles()), rows = std::min(ceil_div(tiles, columns), h.tiles());
    int64_t span = 0;  // positions that tiles of a row read
    for (int64_t i = columns - 1; i < w.tiles(); ++i)
      span = std::max(span, w.last_position(i) + 1 - w.start[i - columns + 1]);
    const int64_t lines = rows * h.in - (h.dilation == 1 ? (rows - 1) * h.shared(1) : 0);
    return lines * span * std::min(channels, kStripChannels);
  }

  // The tiles of r, whose channel 0 lies at `image`.
  void read(const TileRectangle& r, const T* image, int64_t channels, float* strip, const TransformedTiles& to) const {
    if (channels_last) {
      each_tile(r, to, [&](int64_t th, int64_t tw, TransformedTiles tile) {
        const T* pixels[kMostTilePixels];
        const int64_t count = h.in * w.in;
        int64_t column[kMostTilePixels];
        for (int64_t j = 0; j < w.in; ++j) column[j] = w.source[w.position(tw, j)] * stride[2];
        for (int64_t i = 0; i < h.in; ++i) {
          const int64_t at_h = h.source[h.position(th, i)];
          const T* const line = image + at_h * stride[1];
          for (int64_t j = 0; j < w.in; ++j)
            pixels[i * w.in + j] = at_h < 0 || column[j] < 0 ? zeros : line + column[j];
        }
        for (int64_t c = 0; c < channels; c += to.panel) {
          of_stored(pixels, std::min(to.panel, channels - c), tile.data, to.position_step);
          for (int64_t i = 0; i < count; ++i) pixels[i] += to.panel;
          tile.data += to.panel_step;
        }
      });
      return;
    }
    for (int64_t c = 0; c < channels;) {
      const int64_t in_panel = c % to.panel, most = std::min({channels - c, to.panel - in_panel, kStripChannels});
      TransformedTiles part = to;
      part.data += c / to.panel * to.panel_step + in_panel;
      read_planes(r, image + c * plane, most, strip, part);
      c += most;
    }
  }

  void read_planes(const TileRectangle& r, const T* planes, int64_t channels, float* strip,
                   const TransformedTiles& to) const {
    const int64_t low = w.start[r.w0], pitch = (w.last_position(r.w1 - 1) + 1 - low) * channels;
    fill_strip(r, planes, channels, strip);
    const float* line = strip;  // of the first one that the tile row reads
    each_tile(r, to, [&](int64_t th, int64_t tw, const TransformedTiles& tile) {
      if (th > r.h0 && tw == r.w0) line += (h.in - h.shared(th)) * pitch;
      const float* pixels[kMostTilePixels];
      for (int64_t i = 0; i < h.in; ++i)
        for (int64_t j = 0; j < w.in; ++j)
          pixels[i * w.in + j] = line + i * pitch + (w.position(tw, j) - low) * channels;
      of_strip(pixels, channels, tile.data, to.position_step);
    });
  }

  template <typename F>
  void each_tile(const TileRectangle& r, TransformedTiles to, const F& f) const {
    for (int64_t th = r.h0; th < r.h1; ++th)
      for (int64_t tw = r.w0; tw < r.w1; ++tw, to.data += to.tile_step) f(th, tw, to);
  }

  // strip[line][pixel][channel] of what the tiles of r read, with its padding.
  void fill_strip(const TileRectangle& r, const T* planes, int64_t channels, float* strip) const {
    const int64_t w0 = w.start[r.w0], w1 = w.last_position(r.w1 - 1) + 1;
    for (int64_t tile = r.h0; tile < r.h1; ++tile)
      for (int64_t i = tile > r.h0 ? h.shared(tile) : 0; i < h.in; ++i, strip += (w1 - w0) * channels) {
        const int64_t at_h = h.source[h.position(tile, i)], line = at_h * stride[1];
        for (int64_t at = w0; at < w1;) {  // runs of pixels that lie side by side
          const int64_t first = at_h < 0 ? -1 : w.source[at];
          int64_t end = at + 1;
          while (end < w1 && (first < 0 ? at_h < 0 || w.source[end] < 0 : w.source[end] == first + end - at)) ++end;
          float* const target = strip + (at - w0) * channels;
          if (first < 0)
            std::fill_n(target, (end - at) * channels, 0.0f);
          else
            stored.transpose(planes + line + first, plane, channels, end - at, target, channels);
          at = end;
        }
      }
  }
};

}  // namespace myconv::cpu
