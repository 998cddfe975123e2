// Pointwise convolutions: one tap, stride 1, no padding. Pixel o of the result reads pixel o and no other, so that a
// convolution is one matrix product per group (and, in NCHW, per sample) of the tensors as they lie. forward and
// backward_input of all floating-point types; for backward_input in and out channels change places.
//
//   layout   rows (register tile)   columns (vectors)    depth      packed
//   NHWC     pixels                 result channels      channels   weights, transposed into panels [channel][width]
//   NCHW     result channels        pixels of a plane    channels   a panel [channel][width] of pixels, if rows share it
//                                                                   and where it lies it would not stay in L1
//
// Few pixels (at most kDotPixels a sample: squeeze-and-excitation, heads): nothing would share a packed weight. There
// each result is a dot product of two rows as they lie, with vectors along the channels. So are, in NCHW, the last
// pixels of a plane if they are too few for a vector (one of 49, four of 196) and the channels are many.
//
// Threads split pixels or result channels, whichever leaves them more equal work, never a sum.
// Sums: blocks of at most kSumLength channels, each from a fresh accumulator, added in order; bias with the first. Dot
// products: one sum per lane, then the lanes, then the bias.
// 16-bit types are packed into words (stored.h); rows that are not pairs as they lie are packed, too. Blocks of a
// sum follow each other for one tile, in float32, and are rounded at the end.
// Declines: more than one tap, a stride, padding, types other than floating-point. Yields small planes of NCHW to `direct`.
#include <numeric>

#include "cpu/algorithms.h"
#include "cpu/gemm_blocks.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

constexpr int64_t kDotPixels = 4;
constexpr int64_t kShortDot = 32;
constexpr int64_t kFewRows = 256;                // NHWC: up to here a thread packs the panels that it alone multiplies
constexpr int64_t kChunkBytes = 64 << 10;        // NHWC: pixels that meet all panels while these stay in L2
constexpr int64_t kWideChunkBytes = 256 << 10;   // NHWC: and where the panels come from farther away
constexpr int64_t kPanelsInL2 = 512 << 10;       // up to here each thread packs all panels, or weights, for itself
constexpr int64_t kLongRow = 48;                 // NHWC: from here on the next rows are fetched ahead
constexpr int64_t kLongSum = 128;                // NHWC: that has time to fetch where its results go,
constexpr int64_t kResultsOfLongSums = 1 << 20;  // of so many bytes and more
constexpr int64_t kConvertedTiles = 2;           // NHWC: tiles whose rows are packed at a time, if few meet all panels
constexpr int64_t kMostTilesOfBlock = 4;         // NCHW, backward_input
constexpr int64_t kFewPixels = 512;              // NCHW, backward_input: of a plane,
constexpr int64_t kPlaneBytes = 512 << 10;       // and those of a block of a sum stay in L2
constexpr int64_t kMostChannels = 8192;          // NCHW: of a panel that holds all, which 16-bit types need
constexpr int64_t kShortSum = 64;                // NCHW: channels up to which results are fetched early,
constexpr int64_t kStreamed = 8 << 20;           // of tensors above so many bytes
constexpr int64_t kLargeWeight = 1 << 16;        // NCHW: values that a few pixels of one sample leave waiting
constexpr int64_t kTilesAtOnce = 4;              // NCHW: of rows, between which what comes next is fetched,
constexpr int64_t kTermsAtOnce = 1024;           // or fewer, of so many channels in all
constexpr int64_t kInPlaceRowTiles = 2;          // up to so many uses a panel is not worth packing

// Seen from either direction: "from" is what is read, "to" what is written.
struct Product {
  int64_t batch, groups, from, to, pixels;       // channels are those of a group
  int64_t depth;                                 // words that the channels read are packed into
  int64_t to_stride, from_stride, group_stride;  // of the weight
  bool half;

  Product(const ConvShape& s, Direction direction, int64_t pair)
      : batch(s.batch), groups(s.groups), pixels(s.out_pixels()), group_stride(s.out_per_group * s.weight_stride[0]) {
    const bool forward = direction == Direction::kForward;
    from = forward ? s.in_per_group : s.out_per_group, to = forward ? s.out_per_group : s.in_per_group;
    to_stride = s.weight_stride[forward ? 0 : 1], from_stride = s.weight_stride[forward ? 1 : 0];
    depth = ceil_div(from, pair), half = is_half(s.dtype);
  }
  int64_t moved_bytes(int64_t size) const { return batch * groups * (from + to) * pixels * size; }
  // Whether the weights of a result channel follow each other.
  bool in_rows() const { return from_stride == 1 || from == 1; }
  // And are multiplied where they lie: as they are, or as pairs.
  bool rows_in_place(int64_t pair) const {
    return in_rows() && (!half || (pair > 1 && from % pair == 0 && to_stride % pair == 0));
  }
  // A sample of at most kDotPixels pixels, whose channels are contiguous, against weights that lie as [to][from]. To add
  // the lanes of a dot product up takes as long as to pack the weights of kShortDot channels.
  bool is_dot(bool channels_last) const {
    return pixels <= kDotPixels && channels_last && in_rows() && from >= kShortDot;
  }
  // NCHW: weights that are not transposed, against planes that are not packed.
  bool is_few_pixels() const {
    return !half && !in_rows() && to_stride == 1 && pixels <= kFewPixels &&
           std::min(depth, kSumLength) * pixels * static_cast<int64_t>(sizeof(float)) <= kPlaneBytes;
  }
  // How many of the last pixels of a plane are better off as dot products (NCHW). For each result channel a vector, full
  // or not, takes 0.5 to 0.7 cycles a step; a dot product takes 1/32 cycle a step and about 5 to add its lanes up.
  int64_t tail(int64_t lanes) const {
    const int64_t left = half && !in_rows() ? 0 : pixels % lanes;
    return left * (from + 160) * 2 < from * lanes ? left : 0;
  }
};

constexpr int64_t kTailColumns = 32;  // NCHW: last pixels that are gathered at a time

template <typename T>
struct Operands {
  const T* from;
  const T* weight;
  const Word<T>* bias;
  T* to;
};

// What a tile of `vectors` columns takes for each row and step of depth: one vector alone leaves the two multiply-add
// units waiting for each other.
constexpr double tile_cost(int64_t vectors) { return vectors == 1 ? 1.3 : static_cast<double>(vectors); }

// --- NHWC ------------------------------------------------------------------------------------------------------------

// How rows x columns are split among threads.
struct RowPlan {
  int64_t rows, tiles;  // all pixels of the batch
  Panels panels;        // of a group
  bool split_columns;   // each thread packs the panels of its own columns
  bool panels_lie;      // as they are: then too few rows would share a packed one
  bool own_panels;      // or all panels for itself: to fetch them from another thread costs more
  bool results_ahead;
  int64_t chunk;            // tiles that meet all panels at a time
  int64_t sums, converted;  // 16-bit types, of a thread: rows of sums in the making, words of rows

  RowPlan(const Product& p, int64_t tile_rows, int64_t lanes, int64_t vectors, int64_t word_size, bool in_place,
          int threads)
      : rows(p.batch * p.pixels), tiles(ceil_div(rows, tile_rows)), panels(p.to, lanes, vectors), split_columns(false) {
    const double by_rows =
        static_cast<double>(ceil_div(tiles, threads)) * p.groups * panels.count * tile_cost(panels.width / lanes);
    double best = rows > kFewRows ? 0 : by_rows;
    for (int64_t v = vectors; v >= 1; --v) {
      const Panels narrower(p.to, lanes, v);
      const double cost = static_cast<double>(tiles) * ceil_div(p.groups * narrower.count, threads) * tile_cost(v);
      if (cost <= best) best = cost, panels = narrower, split_columns = true;
    }
    panels_lie = split_columns && !p.half && p.to_stride == 1 && tiles <= kInPlaceRowTiles;
    own_panels = p.groups * panels.count * unit(p) * word_size <= kPanelsInL2;
    results_ahead = fetches_results(rows * p.groups * p.to * (p.half ? 2 : word_size), panels,
                                    p.depth < kLongSum ? kLargeResults : kResultsOfLongSums);
    const int64_t block = std::min(p.depth, kSumLength),
                  kept = in_place ? block : p.depth;  // of a row, from panel to panel
    chunk = std::max<int64_t>(1, (own_panels ? kChunkBytes : kWideChunkBytes) / (tile_rows * kept * word_size));
    sums = p.half && p.depth > kSumLength ? split_columns ? rows : chunk * tile_rows : 0;
    converted = in_place ? 0 : split_columns ? kConvertedTiles * tile_rows * block : chunk * tile_rows * p.depth;
  }
  int64_t unit(const Product& p) const { return p.depth * panels.width; }  // words of one packed panel
  int64_t units_per_pass(const Product& p, int64_t word_size) const {
    return std::clamp<int64_t>(kPackedBytes / (unit(p) * word_size), 1, p.groups * panels.count);
  }
  int64_t packed(const Product& p, int64_t word_size, int threads) const {
    if (split_columns) return threads * std::min(p.depth, kSumLength) * panels.width;
    return units_per_pass(p, word_size) * unit(p) * (own_panels ? threads : 1);
  }
  int64_t of_thread() const { return sums * panels.width + converted; }
};

template <typename T>
void rows_are_pixels(const Product& p, const Operands<T>& o, const Kernels<T>& kernels, Word<T>* workspace,
                     int threads) {
  using W = Word<T>;
  const bool in_place = reads_in_place(kernels, p.from);
  const RowPlan plan(p, kernels.rows, kernels.lanes, kernels.vectors, sizeof(W), in_place, threads);
  const Blocks blocks = reduction_blocks(p.depth, 1, /*taps_inside=*/false);
  const Panels& panels = plan.panels;
  const int64_t width = panels.width, pair = kernels.pair;
  const int64_t from_channels = p.groups * p.from, to_channels = p.groups * p.to;
  W* const of_threads = workspace + plan.packed(p, sizeof(W), threads);

  const auto columns_of = [&](int64_t unit) { return panels.size(unit % panels.count); };
  const auto pack = [&](int64_t unit, const Block& block, W* target) {
    const int64_t group = unit / panels.count, column = panels.begin(unit % panels.count);
    const int64_t channel = block.channel * pair;
    pack_matrix(kernels, o.weight + group * p.group_stride + column * p.to_stride + channel * p.from_stride,
                p.from_stride, p.to_stride, std::min(block.channels * pair, p.from - channel), columns_of(unit), target,
                width);
  };
  const auto first_row = [&](int64_t tile) { return plan.rows * tile / plan.tiles; };
  const auto row_at = [&](int64_t row, int64_t group, int64_t channel) {
    return o.from + row * from_channels + group * p.from + channel * pair;
  };
  const auto sums_of_thread = [&] { return of_threads + at::get_thread_num() * plan.of_thread(); };
  const Term one_run{0, 0};
  // Rows [row, row + rows), which lie at `a`. Blocks that are not the last leave their sums at `partial`.
  const auto multiply = [&](int64_t unit, const Block& block, const W* b, int64_t ldb, int64_t row, int64_t rows,
                            const W* a, int64_t a_row, W* partial, bool from_afar) {
    const int64_t group = unit / panels.count, column = group * p.to + panels.begin(unit % panels.count);
    multiply_rows(kernels,
                  {.tiles = 0,
                   .runs = 1,
                   .depth = block.channels,
                   .run = &one_run,
                   .a = a,
                   .a_row = a_row,
                   .b = b,
                   .ldb = ldb,
                   .c = o.to + row * to_channels + column,
                   .c_row = to_channels,
                   .cols = columns_of(unit),
                   .column_bias = o.bias ? o.bias + column : nullptr,
                   .accumulate = block.start > 0,
                   .results_ahead = plan.results_ahead,
                   .ahead = from_afar,
                   .partial = partial,
                   .partial_step = width,
                   .unfinished = block.start + block.channels < p.depth},
                  rows);
  };

  const int64_t units = p.groups * panels.count;
  const double macs = static_cast<double>(plan.rows) * p.depth * width;  // of a unit
  if (plan.split_columns) {
    parallel_tasks(units, macs + 8.0 * plan.unit(p), [&](int64_t begin, int64_t end) {
      W* const packed = workspace + at::get_thread_num() * std::min(p.depth, kSumLength) * width;
      for (int64_t unit = begin; unit < end; ++unit)
        for (const Block& block : blocks) {
          const int64_t group = unit / panels.count,
                        channels = std::min(block.channels * pair, p.from - block.channel * pair);
          const T* const weight = o.weight + group * p.group_stride + panels.begin(unit % panels.count);
          if (!plan.panels_lie) pack(unit, block, packed);
          const W* const b = plan.panels_lie ? as_words(weight + block.channel * p.from_stride) : packed;
          W* const sums = sums_of_thread();
          W* const converted = sums + plan.sums * width;
          const int64_t step = in_place ? plan.rows : kConvertedTiles * kernels.rows;
          for (int64_t row = 0; row < plan.rows; row += step) {
            const int64_t rows = std::min(step, plan.rows - row);
            const T* const source = row_at(row, group, block.channel);
            if (!in_place) kernels.copy_rows(source, from_channels, rows, channels, converted, block.channels);
            multiply(unit, block, b, plan.panels_lie ? p.from_stride : width, row, rows,
                     in_place ? as_words(source) : converted, in_place ? from_channels / pair : block.channels,
                     sums + row * width, false);
          }
        }
    });
    return;
  }
  const int64_t per_pass = plan.units_per_pass(p, sizeof(W)), block_count = static_cast<int64_t>(blocks.size());
  for (int64_t first = 0; first < units; first += per_pass) {
    const int64_t count = std::min(per_pass, units - first);
    const auto pack_units = [&](int64_t begin, int64_t end, W* packed) {
      for (int64_t i = begin; i < end; ++i)
        for (const Block& block : blocks) pack(first + i, block, packed + i * plan.unit(p) + block.start * width);
    };
    if (!plan.own_panels)
      parallel_tasks(count, 8.0 * plan.unit(p), [&](int64_t begin, int64_t end) { pack_units(begin, end, workspace); });
    // One block, one group: what the next tile reads follows what this one reads.
    const bool ahead = p.groups == 1 && block_count == 1 && p.from >= kLongRow;
    parallel_tasks(plan.tiles, macs * count / plan.tiles, [&](int64_t begin, int64_t end) {
      W* const packed = workspace + (plan.own_panels ? at::get_thread_num() * count * plan.unit(p) : 0);
      if (plan.own_panels) pack_units(0, count, packed);
      W* const sums = sums_of_thread();
      W* const converted = sums + plan.sums * width;
      for (int64_t tile = begin; tile < end; tile += plan.chunk) {
        const int64_t row = first_row(tile), rows = first_row(std::min(end, tile + plan.chunk)) - row;
        for (int64_t j = 0; j < block_count * count; ++j) {
          // All panels for a block; sums that are rounded at their end, all blocks for a panel.
          const int64_t i = p.half ? j / block_count : j % count;
          const Block& block = blocks[p.half ? j % block_count : j / count];
          const int64_t group = (first + i) / panels.count;
          if (!in_place && block.start == 0 && (i == 0 || (first + i) % panels.count == 0))
            kernels.copy_rows(row_at(row, group, 0), from_channels, rows, p.from, converted, p.depth);
          multiply(first + i, block, packed + i * plan.unit(p) + block.start * width, width, row, rows,
                   in_place ? as_words(row_at(row, group, block.channel)) : converted + block.start,
                   in_place ? from_channels / pair : p.depth, sums, in_place && ahead && i == 0);
        }
      }
    });
  }
}

// --- NCHW ------------------------------------------------------------------------------------------------------------

struct ColumnPlan {
  int64_t row_tiles, vectors;  // of one product
  int64_t splits, pieces;      // of the rows, of all vectors of all products
  int64_t tiles_at_once;       // of rows: the shorter sums are, the more
  bool in_rows, in_place;      // whether weights, pixels are read where they lie
  bool own_weights;            // or each thread packs the weights that it reads
  bool few_rows;               // for which nothing is fetched early
  int64_t packed_rows;         // weights that are packed at a time
  int64_t tail;                // last pixels of a plane, as dot products
  int64_t sums;                // 16-bit types: of tiles that are in the making

  ColumnPlan(const Product& p, int64_t tile_rows, int64_t lanes, int64_t vectors_of_tile, int64_t word_size,
             bool rows_in_place, int threads)
      : row_tiles(ceil_div(p.to, tile_rows)), tail(p.tail(lanes)) {
    vectors = ceil_div(p.pixels - tail, lanes);
    const int64_t all = p.batch * p.groups * vectors;
    double best = -1;
    for (int64_t s = 1; s <= std::min<int64_t>(threads, row_tiles); ++s) {
      if (threads % s) continue;
      // Packing a vector takes as long as half a row tile's arithmetic on it.
      const double cost = (static_cast<double>(ceil_div(row_tiles, s)) + 0.5) * ceil_div(all, threads / s);
      if (best < 0 || cost < best) best = cost, splits = s;
    }
    pieces = std::clamp<int64_t>(all, 1, threads / splits);
    in_rows = rows_in_place;
    few_rows = ceil_div(row_tiles, splits) <= kInPlaceRowTiles;
    in_place = !p.half && (few_rows || lies_apart(p, vectors_of_tile * lanes * word_size, word_size));
    tiles_at_once = std::clamp<int64_t>(kTermsAtOnce / p.depth, 1, kTilesAtOnce);
    packed_rows = in_rows ? p.to : std::clamp<int64_t>(kPackedBytes / (p.groups * p.depth * word_size), 1, p.to);
    own_weights = !in_rows && tail == 0 && packed_rows == p.to && p.groups * p.to * p.depth * word_size <= kPanelsInL2;
    sums = p.half && p.depth > kSumLength ? kTilesAtOnce * tile_rows * lanes * vectors_of_tile : 0;
  }
  // Whether the rows of a panel, where they lie, spread over the sets of the caches: up to kWays lines in each of L1.
  static bool lies_apart(const Product& p, int64_t row_bytes, int64_t word_size) {
    constexpr int64_t kLine = 64, kWay = 4096, kWays = 16;
    const int64_t row_lines = row_bytes / kLine + 1, differ = kWay / std::gcd(p.pixels * word_size, kWay);
    return std::min(p.depth, kSumLength) * row_lines <= kWays * std::min(kWay / kLine, differ * row_lines);
  }
  int64_t packed(const Product& p, int threads) const {
    return in_rows ? 0 : packed_rows * p.groups * p.depth * (own_weights ? threads : 1);
  }
  int64_t panel(const Product& p, int64_t width) const {
    return in_place ? 0 : (p.half ? p.depth : std::min(p.depth, kSumLength)) * width;
  }
  int64_t tails(const Product& p) const { return tail ? kTailColumns * p.from : 0; }
  int64_t scratch(const Product& p, int64_t width) const { return sums + std::max(panel(p, width), tails(p)); }
};

// The last pixels of every plane against rows [row0, row1) of the weights at hand, which begin at channel `first`.
template <typename T>
void multiply_tails(const Product& p, const Operands<T>& o, const Kernels<T>& kernels, int64_t tail, const T* weight,
                    int64_t group_stride, int64_t row_stride, int64_t first, int64_t row0, int64_t row1, T* gathered) {
  const int64_t columns = p.batch * tail, begin = p.pixels - tail;
  T* c[kTailColumns];
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t column = 0; column < columns; column += kTailColumns) {
      const int64_t cols = std::min(kTailColumns, columns - column);
      for (int64_t j = 0; j < cols; ++j) {
        const int64_t product = (column + j) / tail * p.groups + group, pixel = begin + (column + j) % tail;
        const T* const source = o.from + product * p.from * p.pixels + pixel;
        for (int64_t k = 0; k < p.from; ++k) gathered[j * p.from + k] = source[k * p.pixels];
        c[j] = o.to + (product * p.to + first + row0) * p.pixels + pixel;
      }
      for (int64_t row = row0; row < row1; row += kernels.lanes) {
        kernels.dot({.depth = p.from,
                     .a = weight + group * group_stride + row * row_stride,
                     .lda = row_stride,
                     .rows = std::min<int64_t>(kernels.lanes, row1 - row),
                     .b = gathered,
                     .ldb = p.from,
                     .cols = cols,
                     .bias = o.bias ? o.bias + group * p.to + first + row : nullptr,
                     .c = c,
                     .c_step = p.pixels});
        for (int64_t j = 0; j < cols; ++j) c[j] += kernels.lanes * p.pixels;
      }
    }
}

// Columns [0, cols) of a plane's pixels against rows [row0, row1) of the weights at hand, and what comes after them.
template <typename T>
struct ColumnPanel {
  using W = Word<T>;
  const T* pixels;  // of the first channel read
  T* result;        // of row 0
  const W* weights;
  const W* bias;  // or nullptr
  int64_t row_stride, row0, row1, cols, width;
  const T* next;  // the panel that is fetched into L2 meanwhile, or nullptr
  const T* next_result;
  int64_t early;  // so many rows early the places of results are fetched, or 0
};

// Fetches a share of what comes next: `count` of the panel's channels, and places of the results of `rows` rows. Inlined,
// since gcc drops calls of functions that do nothing else.
template <typename T>
inline __attribute__((always_inline)) void fetch_ahead(const Product& p, const ColumnPanel<T>& panel, int64_t widest,
                                                       int64_t channel, int64_t count, int64_t row, int64_t rows) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));  // values of a line of the cache
  if (panel.next)
    for (int64_t k = channel; k < channel + count; ++k)
      for (int64_t j = 0; j < widest; j += kLine) __builtin_prefetch(panel.next + k * p.pixels + j, 0, 2);
  if (panel.early == 0) return;
  for (int64_t r = row + panel.early; r < row + panel.early + rows; ++r) {
    const T* const at =
        r < panel.row1 ? panel.result + r * p.pixels : panel.next_result + (r - panel.row1 + panel.row0) * p.pixels;
    for (int64_t j = 0; j < panel.cols; j += kLine) __builtin_prefetch(at + j, 1);
  }
}

// The first tile of rows, which reads the pixels where they lie and leaves the panel behind for the others.
template <typename T>
void multiply_packing(const Product& p, const ColumnPanel<T>& panel, const Kernels<T>& kernels, const Block& block,
                      const T* source, Word<T>* packed) {
  const Word<T>* a[kMaxRows];
  T* c[kMaxRows];
  for (int64_t r = 0; r < kernels.rows; ++r) {
    a[r] = panel.weights + (panel.row0 + r) * panel.row_stride + block.channel;
    c[r] = panel.result + (panel.row0 + r) * p.pixels;
  }
  kernels.gemm_packing({.taps = 1,
                        .depth = block.channels,
                        .a = a,
                        .a_offset = 0,
                        .a_step = 1,
                        .b = as_words(source),
                        .b_offsets = nullptr,
                        .ldb = p.pixels,
                        .c = c,
                        .cols = panel.cols,
                        .row_bias = panel.bias ? panel.bias + panel.row0 : nullptr,
                        .column_bias = nullptr,
                        .accumulate = block.start > 0,
                        .packed = packed});
}

// All rows of a panel, block after block. Sums that are rounded at their end: all blocks for some tiles; else all tiles
// for a block. `sums` and `packed` are the thread's.
template <typename T>
void multiply_panel(const Product& p, const ColumnPlan& plan, const ColumnPanel<T>& panel, const Kernels<T>& kernels,
                    const Blocks& blocks, Word<T>* sums, Word<T>* packed) {
  const int64_t widest = kernels.lanes * kernels.vectors, row0 = panel.row0, row1 = panel.row1;
  const Term one_run{0, 0};
  const size_t at_once = p.half ? blocks.size() : 1;
  const bool packs = !p.half && !plan.in_place && row1 - row0 >= kernels.rows;
  const int64_t rest0 = row0 + (packs ? kernels.rows : 0);
  const int64_t tiles = ceil_div(row1 - rest0, kernels.rows), rest = ceil_div(tiles, plan.tiles_at_once);
  const auto row_of = [&](int64_t part) {
    return part < 0 ? row0 : part == rest ? row1 : rest0 + (row1 - rest0) * (tiles * part / rest) / tiles;
  };
  for (size_t block0 = 0; block0 < blocks.size(); block0 += at_once) {
    const int64_t channel = blocks[block0].channel * kernels.pair;
    const int64_t channels = p.half ? p.from : blocks[block0].channels;
    const T* const source = panel.pixels + channel * p.pixels;
    if (!plan.in_place && !packs) kernels.copy_channels(source, p.pixels, channels, panel.cols, packed, panel.width);
    for (int64_t part = packs ? -1 : 0; part < rest; ++part) {
      const int64_t row = row_of(part), rows = row_of(part + 1) - row, parts = rest + packs;
      const int64_t k0 = channels * (part + packs) / parts, k1 = channels * (part + packs + 1) / parts;
      fetch_ahead(p, panel, widest, channel + k0, k1 - k0, row, rows);
      if (part < 0) {
        multiply_packing(p, panel, kernels, blocks[block0], source, packed);
        continue;
      }
      for (size_t b = block0; b < block0 + at_once; ++b) {
        const Block& block = blocks[b];
        multiply_rows(
            kernels,
            {.tiles = 0,
             .runs = 1,
             .depth = block.channels,
             .run = &one_run,
             .a = panel.weights + row * panel.row_stride + block.channel,
             .a_row = panel.row_stride,
             .b = plan.in_place ? as_words(source) : packed + (block.start - blocks[block0].start) * panel.width,
             .ldb = plan.in_place ? p.pixels : panel.width,
             .c = panel.result + row * p.pixels,
             .c_row = p.pixels,
             .cols = panel.cols,
             .column_bias = nullptr,
             .accumulate = block.start > 0,
             .row_bias = panel.bias ? panel.bias + row : nullptr,
             .results_ahead = panel.early == 0,
             .partial = sums,
             .partial_step = widest,
             .unfinished = b + 1 < blocks.size()},
            rows);
      }
    }
  }
}

template <typename T>
void columns_are_pixels(const Product& p, const Operands<T>& o, const Kernels<T>& kernels, Word<T>* workspace,
                        int threads) {
  using W = Word<T>;
  const ColumnPlan plan(p, kernels.rows, kernels.lanes, kernels.vectors, sizeof(W), p.rows_in_place(kernels.pair),
                        threads);
  const Blocks blocks = reduction_blocks(p.depth, 1, /*taps_inside=*/true);
  const int64_t lanes = kernels.lanes, scratch_size = plan.scratch(p, lanes * kernels.vectors);
  const int64_t all = p.batch * p.groups * plan.vectors;
  const bool streams = p.from <= kShortSum && p.moved_bytes(sizeof(T)) > kStreamed;

  for (int64_t first = 0; first < p.to; first += plan.packed_rows) {
    const int64_t count = std::min(plan.packed_rows, p.to - first);
    // Rows [row0, row1) of all groups, as [group][row][channel].
    const auto pack_weights = [&](int64_t group, int64_t row0, int64_t row1, W* packed) {
      pack_rows(kernels, o.weight + group * p.group_stride + (first + row0) * p.to_stride, p.to_stride, p.from_stride,
                row1 - row0, p.from, packed + (group * count + row0) * p.depth, p.depth);
    };
    if (!plan.in_rows && !plan.own_weights)
      parallel_tasks(p.groups * ceil_div(count, lanes), 8.0 * lanes * p.depth, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = i % ceil_div(count, lanes) * lanes;
          pack_weights(i / ceil_div(count, lanes), row, std::min(count, row + lanes), workspace);
        }
      });
    const W* const shared_weight = plan.in_rows ? as_words(o.weight + first * p.to_stride) : workspace;
    const int64_t group_stride = plan.in_rows ? p.group_stride / kernels.pair : count * p.depth;
    const int64_t row_stride = plan.in_rows ? p.to_stride / kernels.pair : p.depth;

    // Short sums of large tensors: where results go is fetched so many rows early.
    const int64_t early =
        streams && !plan.few_rows ? std::min(kernels.rows * ceil_div(kShortSum, p.from), count / plan.splits) : 0;
    const int64_t tasks = plan.pieces * plan.splits;
    const double macs = static_cast<double>(all) * lanes * p.depth * count / tasks;
    parallel_tasks(tasks, macs, [&](int64_t begin, int64_t end) {
      W* const sums = workspace + plan.packed(p, threads) + at::get_thread_num() * scratch_size;
      W* const packed = sums + plan.sums;
      W* const own_weight = plan.own_weights ? workspace + at::get_thread_num() * p.groups * count * p.depth : nullptr;
      const W* const weight = own_weight ? own_weight : shared_weight;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t split = task % plan.splits, piece = task / plan.splits;
        const int64_t last = all * (piece + 1) / plan.pieces;
        const int64_t row0 = count * split / plan.splits, row1 = count * (split + 1) / plan.splits;
        if (own_weight)
          for (int64_t group = 0; group < p.groups; ++group) pack_weights(group, row0, row1, own_weight);
        for (int64_t at = all * piece / plan.pieces, take; at < last; at += take) {
          // What is left of this product, in panels as equal as possible.
          const int64_t product = at / plan.vectors, vector = at % plan.vectors;
          const int64_t left = std::min(last - at, plan.vectors - vector);
          take = ceil_div(left, ceil_div(left, kernels.vectors));
          const int64_t pixel = vector * lanes, group = product % p.groups;
          const T* const pixels = o.from + product * p.from * p.pixels + pixel;
          T* const result = o.to + (product * p.to + first) * p.pixels + pixel;
          const bool of_product = take < left;  // whether the next panel is of the same product
          const T* const next = of_product ? pixels + take * lanes : o.from + (product + 1) * p.from * p.pixels;
          multiply_panel<T>(p, plan,
                            {.pixels = pixels,
                             .result = result,
                             .weights = weight + group * group_stride,
                             .bias = o.bias ? o.bias + group * p.to + first : nullptr,
                             .row_stride = row_stride,
                             .row0 = row0,
                             .row1 = row1,
                             .cols = std::min(take * lanes, p.pixels - plan.tail - pixel),
                             .width = take * lanes,
                             .next = at + take < last && !plan.few_rows ? next : nullptr,
                             .next_result = of_product ? result + take * lanes : result + p.to * p.pixels - pixel,
                             .early = early},
                            kernels, blocks, sums, packed);
        }
        if (plan.tail > 0)
          multiply_tails(p, o, kernels, plan.tail,
                         kIsHalf<T> ? o.weight + first * p.to_stride : reinterpret_cast<const T*>(weight),
                         kIsHalf<T> ? p.group_stride : group_stride, kIsHalf<T> ? p.to_stride : row_stride, first,
                         count * task / tasks, count * (task + 1) / tasks, reinterpret_cast<T*>(packed));
      }
    });
  }
}

// --- NCHW, weights that lie as [channel read][result channel]: backward_input ----------------------------------------
//
// A row of the weights has the values of neighbouring result channels, so that a tile of them is packed without being
// transposed: [tile][channel][row of the tile]. Threads take blocks of tiles, each for some samples, and pixels are read
// where they lie, as long as those of a block of a sum stay in L2. The last pixels of the planes, if they are too few for
// a vector, change sides: they are rows, and result channels the columns, of weights as they lie.

struct BlockPlan {
  int64_t rows, blocks, parts;  // result channels of a block; parts of the batch
  int64_t tail;                 // last pixels of a plane

  BlockPlan(const Product& p, int64_t tile_rows, int64_t lanes, int threads)
      : tail(4 * (p.pixels % lanes) <= lanes ? p.pixels % lanes : 0) {
    double best = -1;
    for (int64_t tiles = kMostTilesOfBlock; tiles >= 1; --tiles)
      for (int64_t n = 1; n <= std::min<int64_t>(p.batch, threads); ++n) {
        const int64_t count = ceil_div(p.to, tiles * tile_rows);
        // Packing a vector of weights takes about as long as multiplying it four times.
        const double of_task = static_cast<double>(ceil_div(p.pixels - tail, lanes) * ceil_div(p.batch, n)) + 0.25;
        const double cost = static_cast<double>(ceil_div(p.groups * count * n, threads) * tiles) * of_task;
        if (best < 0 || cost < 0.97 * best) best = cost, rows = tiles * tile_rows, blocks = count, parts = n;
      }
  }
  int64_t packed(const Product& p) const { return rows * std::min(p.depth, kSumLength); }  // of a thread
};

template <typename T>
void columns_are_few_pixels(const Product& p, const Operands<T>& o, const Kernels<T>& kernels, T* workspace,
                            int threads) {
  const BlockPlan plan(p, kernels.rows, kernels.lanes, threads);
  const Blocks sums = reduction_blocks(p.depth, 1, /*taps_inside=*/true);
  const Panels panels(p.pixels - plan.tail, kernels.lanes, kernels.vectors);
  const int64_t tasks = p.groups * plan.blocks * plan.parts, tail = plan.tail;
  const double macs = static_cast<double>(p.batch * p.groups * p.to) * p.depth * p.pixels;
  parallel_tasks(tasks, macs / tasks, [&](int64_t begin, int64_t end) {
    T* const packed = workspace + at::get_thread_num() * plan.packed(p);
    const T* a[kMaxRows];
    T* c[kMaxRows];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % plan.parts, block = task / plan.parts % plan.blocks;
      const int64_t group = task / (plan.parts * plan.blocks), row0 = block * plan.rows;
      const int64_t rows = std::min(plan.rows, p.to - row0), tiles = ceil_div(rows, kernels.rows);
      const int64_t n0 = p.batch * part / plan.parts, n1 = p.batch * (part + 1) / plan.parts;
      const T* const weight = o.weight + group * p.group_stride + row0;
      const int64_t steps = (n1 - n0) * panels.count * tiles;
      const T* const bias = o.bias ? o.bias + group * p.to + row0 : nullptr;
      for (const Block& sum : sums) {
        constexpr int64_t kAtOnce = 16;  // channels: their values are read in the order of memory
        const T* const values = weight + sum.channel * p.from_stride;
        for (int64_t k = 0; k < sum.channels; k += kAtOnce)
          for (int64_t row = 0; row < rows; row += kernels.rows) {
            const int64_t height = std::min<int64_t>(kernels.rows, rows - row);
            kernels.copy_rows(values + k * p.from_stride + row, p.from_stride, std::min(kAtOnce, sum.channels - k),
                              height, packed + row * sum.channels + k * height, height);
          }
        // Meanwhile the weights that come next are fetched into L2: too far apart for the machine to see them coming.
        const bool last = &sum == sums.end() - 1;
        const T* const next = last ? weight + plan.rows : (&sum + 1)->channel * p.from_stride + weight;
        const int64_t next_channels = last ? (block + 1 < plan.blocks ? sums[0].channels : 0) : (&sum + 1)->channels;
        int64_t step = 0;
        for (int64_t n = n0; n < n1; ++n) {
          const int64_t product = n * p.groups + group;
          const T* const plane = o.from + (product * p.from + sum.channel) * p.pixels;
          for (int64_t row = 0; row < rows; row += kernels.rows)
            for (int64_t j = 0; j < panels.count; ++j, ++step) {
              for (int64_t k = next_channels * step / steps; k < next_channels * (step + 1) / steps; ++k)
                for (int64_t r = 0; r < rows; r += 64 / static_cast<int64_t>(sizeof(T)))
                  __builtin_prefetch(next + k * p.from_stride + r, 0, 2);
              const int64_t height = std::min<int64_t>(kernels.rows, rows - row);
              for (int64_t r = 0; r < height; ++r) {
                a[r] = packed + row * sum.channels + r;
                c[r] = o.to + (product * p.to + row0 + row + r) * p.pixels + panels.begin(j);
              }
              kernels.gemm[height - 1]({.taps = 1,
                                        .depth = sum.channels,
                                        .a = a,
                                        .a_offset = 0,
                                        .a_step = height,
                                        .b = plane + panels.begin(j),
                                        .b_offsets = nullptr,
                                        .ldb = p.pixels,
                                        .c = c,
                                        .cols = panels.size(j),
                                        .row_bias = bias ? bias + row : nullptr,
                                        .column_bias = nullptr,
                                        .accumulate = sum.start > 0});
            }
        }
        const auto pixel_of = [&](int64_t t) {  // the plane and place of a last pixel, in what is read
          return std::pair{(n0 + t / tail) * p.groups + group, p.pixels - tail + t % tail};
        };
        T results[kMaxRows * kMostTilesOfBlock * kMaxRows];
        for (int64_t t0 = 0, count; t0 < (n1 - n0) * tail; t0 += count) {
          count = std::min<int64_t>(kernels.rows, (n1 - n0) * tail - t0);
          const auto each_result = [&](const auto& f) {
            for (int64_t t = 0; t < count; ++t) {
              const auto [product, pixel] = pixel_of(t0 + t);
              T* const to = o.to + (product * p.to + row0) * p.pixels + pixel;
              for (int64_t r = 0; r < rows; ++r) f(results[t * rows + r], to[r * p.pixels]);
            }
          };
          if (sum.start > 0) each_result([](T& sum_so_far, const T& to) { sum_so_far = to; });
          for (int64_t t = 0; t < count; ++t) {
            const auto [product, pixel] = pixel_of(t0 + t);
            a[t] = o.from + (product * p.from + sum.channel) * p.pixels + pixel;
          }
          for (int64_t column = 0; column < rows; column += kernels.vectors * kernels.lanes) {
            for (int64_t t = 0; t < count; ++t) c[t] = results + t * rows + column;
            kernels.gemm[count - 1]({.taps = 1,
                                     .depth = sum.channels,
                                     .a = a,
                                     .a_offset = 0,
                                     .a_step = p.pixels,
                                     .b = values + column,
                                     .b_offsets = nullptr,
                                     .ldb = p.from_stride,
                                     .c = c,
                                     .cols = std::min<int64_t>(kernels.vectors * kernels.lanes, rows - column),
                                     .row_bias = nullptr,
                                     .column_bias = bias ? bias + column : nullptr,
                                     .accumulate = sum.start > 0});
          }
          each_result([](const T& result, T& to) { to = result; });
        }
      }
    }
  });
}

// --- few pixels ------------------------------------------------------------------------------------------------------

template <typename T>
void dot_products(const Product& p, const Operands<T>& o, const Kernels<T>& kernels) {
  const int64_t rows = p.batch * p.pixels, pieces = ceil_div(p.to, kernels.lanes);
  parallel_tasks(p.groups * pieces, static_cast<double>(rows + 2) * p.from * kernels.lanes,
                 [&](int64_t begin, int64_t end) {
                   c10::SmallVector<T*, 32> c(rows);
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t group = i / pieces, first = i % pieces * kernels.lanes;
                     for (int64_t r = 0; r < rows; ++r) c[r] = o.to + (r * p.groups + group) * p.to + first;
                     kernels.dot({.depth = p.from,
                                  .a = o.weight + group * p.group_stride + first * p.to_stride,
                                  .lda = p.to_stride,
                                  .rows = std::min<int64_t>(kernels.lanes, p.to - first),
                                  .b = o.from + group * p.from,
                                  .ldb = p.groups * p.from,
                                  .cols = rows,
                                  .bias = o.bias ? o.bias + group * p.to + first : nullptr,
                                  .c = c.data(),
                                  .c_step = 1});
                   }
                 });
}

// --- both ------------------------------------------------------------------------------------------------------------

template <typename T>
void run(const ConvShape& s, Direction direction, const void* from, const ConvPointers& pointers, void* workspace,
         int threads) {
  const Kernels<T>& kernels = dense_kernels<T>();
  const Product p(s, direction, kernels.pair);
  const Bias<T> bias(microkernels(), pointers.bias, p.groups * p.to);
  const Operands<T> o{static_cast<const T*>(from), static_cast<const T*>(pointers.weight), bias.get(),
                      static_cast<T*>(pointers.result)};
  if (p.is_dot(s.channels_last())) return dot_products(p, o, kernels);
  if constexpr (!kIsHalf<T>)
    if (!s.channels_last() && p.is_few_pixels())
      return columns_are_few_pixels(p, o, kernels, static_cast<T*>(workspace), threads);
  (s.channels_last() ? rows_are_pixels<T> : columns_are_pixels<T>)(p, o, kernels, static_cast<Word<T>*>(workspace),
                                                                   threads);
}

template <typename T>
int64_t workspace_bytes(const ConvShape& s, Direction direction, int threads) {
  constexpr int64_t size = sizeof(Word<T>);
  const Kernels<T>& k = dense_kernels<T>();
  const Product p(s, direction, k.pair);
  const bool in_place = reads_in_place(k, p.from);
  if (p.is_dot(s.channels_last())) return 0;
  if (s.channels_last()) {
    const RowPlan plan(p, k.rows, k.lanes, k.vectors, size, in_place, threads);
    return (plan.packed(p, size, threads) + threads * plan.of_thread()) * size;
  }
  if (p.is_few_pixels()) return threads * BlockPlan(p, k.rows, k.lanes, threads).packed(p) * size;
  const ColumnPlan plan(p, k.rows, k.lanes, k.vectors, size, p.rows_in_place(k.pair), threads);
  return (plan.packed(p, threads) + threads * plan.scratch(p, k.lanes * k.vectors)) * size;
}

int64_t workspace(const ConvShape& s, Direction direction, int threads) {
  return with_type(s.dtype, [&](auto type) { return workspace_bytes<decltype(type)>(s, direction, threads); });
}

void run_any(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
             int threads) {
  with_type(s.dtype, [&](auto type) { run<decltype(type)>(s, direction, from, p, workspace, threads); });
}

const char* decline(const ConvShape& s) {
  if (!is_floating_point(s.dtype)) return "only floating-point types";
  if (s.in_per_group == 0 || s.out_per_group == 0 || s.in_pixels() == 0 || s.out_pixels() == 0)
    return "nothing to sum over";
  if (s.taps() != 1) return "more than one tap";
  if (is_half(s.dtype) && !s.channels_last() && std::max(s.in_per_group, s.out_per_group) > kMostChannels)
    return "16-bit panels of more than 8192 channels";
  for (int d = 0; d < 3; ++d)
    if ((s.stride[d] != 1 && s.out[d] != 1) || s.pad[d] != 0 || s.in[d] != s.out[d]) return "a stride or padding";
  return nullptr;
}

}  // namespace

const char* pointwise_decline(const ConvShape& s) { return decline(s); }
const char* pointwise_forward_yield(const ConvShape& s) {
  if (s.channels_last() || is_half(s.dtype) || s.in_per_group * s.out_per_group < kLargeWeight) return nullptr;
  const int64_t lanes = s.dtype == Dtype::kFloat64 ? microkernels().f64.lanes : microkernels().f32.lanes;
  return 4 * s.out_pixels() <= 3 * lanes ? "planes that leave lanes empty, which several samples fill" : nullptr;
}

int64_t pointwise_forward_workspace(const ConvShape& s, int threads) {
  return workspace(s, Direction::kForward, threads);
}
int64_t pointwise_backward_input_workspace(const ConvShape& s, int threads) {
  return workspace(s, Direction::kBackwardInput, threads);
}

void pointwise_forward(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  run_any(s, Direction::kForward, p.input, p, workspace, threads);
}
void pointwise_backward_input(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  run_any(s, Direction::kBackwardInput, p.grad_output, p, workspace, threads);
}

}  // namespace myconv::cpu
