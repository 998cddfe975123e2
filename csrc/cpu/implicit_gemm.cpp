// Implicit GEMM for forward and backward_input in NHWC: dense and grouped convolutions of any kernel, stride, dilation.
//
// Both directions are gathers (gather.h), and a gather is a matrix product per phase and group whose one operand is
// never built: rows (register tile) are result pixels, columns (vectors) result channels, the depth taps x channels.
// Weights are packed once a call into panels [block][tap][channel][width]; activations are read where they lie:
//
//   by rectangles   result pixels that read inside the image through the same taps: all of their rows lie at one
//                   distance and every tap at one offset, so nothing is set up for a tile; taps in the padding are
//                   left out exactly
//   by pointers     images so small that rectangles make no tiles: one pointer for each (tap, pixel); a pixel in the
//                   padding points to a row of zeros
//
// Taps in the padding may be left out where all weights are finite; what is left is summed as before, and adding 0
// changes nothing. Otherwise, and in other padding modes, what reads the padding is done by pointers.
//
// 16-bit types are multiplied as words (stored.h), in which channels and terms count. Pixels are read where they
// lie if they are whole pairs; else they are packed, for rectangles the lines that a band of result lines reads.
//
// Sums: blocks of at most kSumLength terms, each from a fresh accumulator, added in order; bias with the first. The
// order does not depend on the tile, so results do not depend on batch or threads.
// Declines: NCHW, types other than floating-point, empty sums, kernels above kMaxTaps, backward_input with a
// padding mode.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/algorithms.h"
#include "cpu/finite.h"
#include "cpu/implicit_gemm_rectangles.h"
#include "cpu/implicit_gemm_tiles.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace myconv::cpu {
namespace {

using namespace implicit_gemm;
constexpr int64_t kMaxPhases = 65536;     // of backward_input: each costs a little set-up
constexpr int64_t kPhasesAtOnce = 16;     // whose plans are kept
constexpr int64_t kOwnPanels = 16 << 20;  // of all threads, that share panels and each pack them for themselves
constexpr double kPackedProducts = 20;    // packing a value takes as long
constexpr double kScattered = 0.025;      // how much longer it takes to read parts of pixels
constexpr int64_t kOwnPixels = 64;        // of a thread, from which on that takes little
constexpr double kNarrower = 0.95;        // of the time with wider panels, that narrower ones may take at most
constexpr double kOneVector = 1.25;       // how much longer a vector takes in a tile of its own

const char* decline(const ConvShape& s) {
  if (!is_floating_point(s.dtype)) return "only floating-point types";
  if (!s.channels_last()) return "only NHWC";
  if (s.in_per_group == 0 || s.out_per_group == 0 || s.in_pixels() == 0 || s.out_pixels() == 0)
    return "nothing to sum over";
  if (s.taps() > kMaxTaps) return "more than 16384 taps";
  return nullptr;
}

// Whether some result reads padding along the axis.
bool is_padded(const GatherAxis& axis) {
  for (int64_t t = 0; t < axis.taps(); ++t)
    if (axis.first_inside(t) > 0 || axis.last_inside(t) < axis.count) return true;
  return false;
}

// The packed weights of a unit: one panel of one group, as [tap][channel][width].
template <typename T>
void pack_unit(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const Panels& panels,
               const T* weight, int64_t unit, const Block& block, Word<T>* target) {
  const int64_t group = unit / panels.count, panel = unit % panels.count, columns = panels.size(panel);
  const int64_t in_channels = g.from_per_group, taps = phase.taps(), first = block.channel * kernels.pair;
  const int64_t channels = std::min(block.channels * kernels.pair, in_channels - first);  // stored values
  const T* const source = weight + group * g.weight_group_stride + panels.begin(panel) * g.weight_to_stride;
  for (int64_t r = 0; columns < panels.width && r < block.terms(); ++r)
    std::fill(target + r * panels.width + columns, target + (r + 1) * panels.width, Word<T>(0));
  // How the terms of a result channel lie.
  bool taps_last = kernels.pair == 1, channels_last = g.weight_from_stride == 1 && in_channels % kernels.pair == 0;
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t offset = g.weight_tap_offset(phase, t);
    taps_last = taps_last && offset == t;
    channels_last = channels_last && offset == t * in_channels;
  }
  if (channels_last)
    return pack_matrix(kernels, source + block.tap * in_channels + first, int64_t{1}, g.weight_to_stride,
                       channels * block.taps, columns, target, panels.width);
  if (taps_last && block.taps > 1) {
    for (int64_t c = 0; c < block.channels; ++c)
      kernels.transpose(source + block.tap + (first + c) * g.weight_from_stride, g.weight_to_stride, columns,
                        block.taps, target + c * panels.width, block.channels * panels.width);
    return;
  }
  for (int64_t t = 0; t < block.taps; ++t)
    pack_matrix(kernels, source + g.weight_tap_offset(phase, block.tap + t) + first * g.weight_from_stride,
                g.weight_from_stride, g.weight_to_stride, channels, columns, target + t * block.channels * panels.width,
                panels.width);
}

// How threads share result rows (lines, or tiles) and units: as many pieces of either as together make one for each
// thread. Where units are cheap to share, what packing a unit costs as a share of its products, `packing`, counts too: each
// thread packs its own units, and nothing passes between threads, whose caches may be far apart. Rows are shared by all.
struct Split {
  int64_t rows = 1, units = 1;
  double cost = -1;  // as a multiple of what the products alone would take

  Split(int64_t all_rows, int64_t all_units, double packing, int threads) {
    const auto uneven = [](int64_t all, int64_t pieces) {
      return static_cast<double>(ceil_div(all, pieces)) * static_cast<double>(pieces) / static_cast<double>(all);
    };
    for (int64_t u = 1; u <= std::min<int64_t>(threads, all_units); ++u) {
      const int64_t r = std::clamp<int64_t>(all_rows, 1, threads / u);
      const double idle = static_cast<double>(threads) / static_cast<double>(r * u);
      const double now =
          uneven(all_units, u) * (uneven(all_rows, r) * idle + packing * threads / static_cast<double>(u)) +
          (packing > 0 && u > 1 ? kScattered : 0);
      if (cost < 0 || now < cost) cost = now, rows = r, units = u;
    }
  }
};

// Panels of a group; narrower ones than the widest where threads share those more evenly.
template <typename T>
Panels panels_for(const Gather& g, const Kernels<T>& kernels, int threads) {
  const Panels widest(g.to_per_group, kernels.lanes, kernels.vectors);
  if (g.groups > 1 || g.phases.empty()) return widest;
  const GatherPhase& phase = g.phases[0];
  const int64_t channels = ceil_div(g.from_per_group, kernels.pair), pixels = g.batch * phase.pixels();
  if (phase.taps() * channels * g.to_per_group <= g.batch * g.from_pixels() * channels) return widest;
  const auto cost = [&](const Panels& panels) {
    const Split split(g.batch * phase.axis[0].count * phase.axis[1].count, panels.count,
                      kPackedProducts / static_cast<double>(pixels), threads);
    return split.cost * (panels.width == panels.lanes ? kOneVector : 1);
  };
  Panels best = widest;
  for (int64_t v = kernels.vectors - 1; v > 0; --v)
    if (const Panels narrower(g.to_per_group, kernels.lanes, v); cost(narrower) < kNarrower * cost(best))
      best = narrower;
  return best;
}

// What one call needs, in words. Packed weights are those of the pass that is being worked on.
struct Workspace {
  int64_t packed, zeros, of_thread = 0;  // zeros: one pixel; of_thread: what rectangles need
  bool own_panels;  // threads that share panels each pack them for themselves: to fetch them costs more

  template <typename T>
  Workspace(const Gather& g, const Kernels<T>& kernels, int64_t all_taps, int threads) {
    constexpr int64_t size = sizeof(Word<T>);
    const Panels panels = panels_for(g, kernels, threads);
    const int64_t unit = all_taps * ceil_div(g.from_per_group, kernels.pair) * panels.width;
    packed = std::min(g.groups * panels.count, std::max<int64_t>(1, kPackedBytes / size / unit)) * unit;
    zeros = round_up(g.groups * g.from_per_group, 16);  // what follows begins with a line of the cache
    own_panels = threads * g.groups * panels.count * unit * size <= kOwnPanels;
    for (const GatherPhase& phase : g.phases)
      if (const auto r = Rectangles<T>::best(g, phase, kernels); r.fits())
        of_thread = std::max(of_thread, round_up(r.converted() + r.sums(), 16));
  }
  int64_t elements(int threads) const { return zeros + (own_panels ? threads : 1) * packed + threads * of_thread; }
};

// A phase that no tap reaches: its pixels are the bias, or zeros.
template <typename T>
void fill_phase(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const Word<T>* bias, T* to) {
  const GatherAxis* a = phase.axis;
  const int64_t channels = g.groups * g.to_per_group, lines = g.batch * a[0].count * a[1].count;
  const std::vector<Word<T>> zeros(bias ? 0 : channels);
  parallel_tasks(lines, static_cast<double>(a[2].count * channels), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const Pixel first{line / (a[0].count * a[1].count), line / a[1].count % a[0].count, line % a[1].count, 0};
      kernels.store_rows(bias ? bias : zeros.data(), 0, a[2].count, channels, result_pixel(g, phase, first, to),
                         a[2].to_step * g.to_stride.axis[2]);
    }
  });
}

// The product of a phase: its plan, and where its packed panels are, one a unit.
template <typename T>
struct PhaseProduct {
  using W = Word<T>;
  const Gather& g;
  const GatherPhase& phase;
  const Kernels<T>& kernels;
  Rectangles<T> rectangles;
  int64_t before;     // words of a panel of all phases before it
  int64_t rows;       // that threads share: lines, or tiles
  bool skips, looks;  // whether products with the padding may be left out, if all weights are finite: if it looks
  bool by_rectangles;

  PhaseProduct(const Gather& g, const GatherPhase& phase, const Kernels<T>& kernels, const Panels& panels,
               int64_t before, bool skip_zeros, int threads)
      : g(g), phase(phase), kernels(kernels), rectangles(Rectangles<T>::best(g, phase, kernels)), before(before) {
    const GatherAxis* a = phase.axis;
    looks = !skip_zeros && a[0].mode == PaddingMode::kZeros && (is_padded(a[0]) || is_padded(a[1]) || is_padded(a[2]));
    skips = looks || skip_zeros;
    by_rectangles = rectangles.cost(skips) <= pointer_cost(g, phase, kernels, skips);
    rectangles.set_panels(panels);  // the choices before are those of any batch and thread count
    // Tiles by pointers add up in the same order; more threads can share one line of them.
    if (lines() * g.groups * panels.count < threads) by_rectangles = false;
    rows = by_rectangles ? lines() : ceil_div(g.batch * phase.pixels(), int64_t{kernels.rows});
  }

  int64_t lines() const { return g.batch * phase.axis[0].count * phase.axis[1].count; }
  int64_t block_count() const { return static_cast<int64_t>(rectangles.blocks().size()); }
  int64_t unit_size() const { return rectangles.unit_size(); }

  // Packs pieces [begin, end) of the panels from unit `first` on, a piece being a block of a panel. Whether products
  // with the padding may be left out.
  bool pack(const T* weight, int64_t first, int64_t begin, int64_t end, W* packed) const {
    const Panels& panels = rectangles.panels();
    bool finite = skips;
    for (int64_t i = begin; i < end; ++i) {
      const Block& block = rectangles.blocks()[i % block_count()];
      const int64_t unit = i / block_count();
      W* const target = packed + unit * unit_size() + block.start * panels.width;
      pack_unit(g, phase, kernels, panels, weight, first + unit, block, target);
      finite = finite && (!looks || kernels.all_finite(target, block.terms() * panels.width));
    }
    return finite;
  }

  // Part `part` of the rows, units [unit0, unit1), whose panels begin at `packed`.
  void multiply(const Operands<T>& o, const W* packed, W* scratch, int64_t part, int64_t parts, int64_t unit0,
                int64_t unit1, bool finite) const {
    if (by_rectangles)
      rectangles.multiply(o, packed, scratch, lines() * part / parts, lines() * (part + 1) / parts, unit0, unit1,
                          finite);
    else
      multiply_by_pointers(g, phase, kernels, rectangles.panels(), o, packed, part, parts, unit0, unit1, finite);
  }
};

// Phases [first, last) together: they read the same lines, a few of which at a time meet all phases.
template <typename T>
void run_phases(const Gather& g, const GatherPhase* first_phase, const GatherPhase* last_phase,
                const Kernels<T>& kernels, const T* weight, const Operands<T>& o, const Workspace& sizes,
                Word<T>* packed, int threads, bool skip_zeros) {
  using W = Word<T>;
  std::vector<PhaseProduct<T>> phases;
  const Panels panels = panels_for(g, kernels, threads);
  int64_t unit_size = 0, rows = INT64_MAX, pixels = 0;
  double macs = 0;  // of a unit
  for (const GatherPhase* phase = first_phase; phase < last_phase; ++phase) {
    if (phase->taps() == 0) {
      fill_phase(g, *phase, kernels, o.bias, o.to);
      continue;
    }
    phases.emplace_back(g, *phase, kernels, panels, unit_size, skip_zeros, threads);
    unit_size += phases.back().unit_size();
    rows = std::min(rows, phases.back().rows);
    pixels += g.batch * phase->pixels();
    macs += static_cast<double>(g.batch * phase->pixels()) * static_cast<double>(phases.back().unit_size());
  }
  if (phases.empty()) return;
  const auto phase_count = static_cast<int64_t>(phases.size());
  pixels /= phase_count;  // which a value of the weights meets
  W* const of_threads = packed + (sizes.own_panels ? threads : 1) * sizes.packed;
  const int64_t units = g.groups * phases[0].rectangles.panels().count,
                channels = ceil_div(g.from_per_group, kernels.pair);
  const int64_t read = g.batch * g.from_pixels() * g.groups * channels;
  // Groups of whole cache lines share nothing that is read.
  const bool lines_of_own = g.groups > 1 && g.from_per_group * static_cast<int64_t>(sizeof(T)) % 64 == 0;
  const int64_t units_per_pass = std::clamp<int64_t>(sizes.packed / unit_size, 1, units);
  for (int64_t first = 0; first < units; first += units_per_pass) {
    const int64_t count = std::min(units_per_pass, units - first);
    const bool shares_units = lines_of_own || count * unit_size > read;
    const Split split(rows, count, shares_units ? kPackedProducts / static_cast<double>(pixels) : 0, threads);
    const bool own = split.rows == 1 || (sizes.own_panels && pixels >= kOwnPixels * split.rows);
    const int64_t chunks = phase_count == 1
                               ? 1
                               : std::clamp<int64_t>(read * static_cast<int64_t>(sizeof(W)) / split.rows / kBandBytes,
                                                     1, std::max<int64_t>(1, rows / split.rows));
    std::vector<std::atomic<bool>> all_finite(phase_count);
    for (int64_t p = 0; p < phase_count; ++p) {
      const PhaseProduct<T>& phase = phases[p];
      const int64_t blocks = phase.block_count();
      all_finite[p] = true;
      if (!own)
        parallel_tasks(count * blocks, 2.0 * phase.unit_size() / blocks, [&](int64_t begin, int64_t end) {
          if (!phase.pack(weight, first, begin, end, packed + count * phase.before)) all_finite[p] = false;
        });
    }
    const int64_t parts = split.rows * split.units;
    parallel_tasks(parts, macs * count / parts, [&](int64_t begin, int64_t end) {
      c10::SmallVector<bool, 16> finite(phase_count);
      const int64_t thread = at::get_thread_num();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t part = i % split.rows, unit = i / split.rows;
        const int64_t unit0 = count * unit / split.units, unit1 = count * (unit + 1) / split.units;
        W* const mine = packed + (own && split.rows > 1 ? thread * sizes.packed : 0);
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          for (int64_t p = 0; p < phase_count; ++p) {
            const PhaseProduct<T>& phase = phases[p];
            W* const panels = mine + count * phase.before + unit0 * phase.unit_size();
            if (chunk == 0)
              finite[p] = own ? phase.pack(weight, first + unit0, 0, (unit1 - unit0) * phase.block_count(), panels)
                              : all_finite[p].load();
            phase.multiply(o, panels, of_threads + thread * sizes.of_thread, part * chunks + chunk, split.rows * chunks,
                           first + unit0, first + unit1, finite[p]);
          }
      }
    });
  }
}

template <typename T>
void run(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
         int threads) {
  Gather g = make_gather(s, direction);
  const Kernels<T>& kernels = dense_kernels<T>(g.to_per_group);
  const auto* const weight = static_cast<const T*>(p.weight);
  const bool skip_zeros = works_on_padding(s) && all_finite(s, weight);
  if (skip_zeros) drop_idle_taps(g);
  const Workspace sizes(g, kernels, s.taps(), threads);
  const Bias<T> bias(microkernels(), p.bias, g.groups * g.to_per_group);
  auto* const zeros = static_cast<Word<T>*>(workspace);
  std::fill_n(zeros, sizes.zeros, Word<T>(0));
  const Operands<T> o{static_cast<const T*>(from), bias.get(), static_cast<T*>(p.result),
                      reinterpret_cast<const T*>(zeros)};
  const auto count = static_cast<int64_t>(g.phases.size());
  for (int64_t first = 0; first < count; first += kPhasesAtOnce)
    run_phases(g, g.phases.begin() + first, g.phases.begin() + std::min(first + kPhasesAtOnce, count), kernels, weight,
               o, sizes, zeros + sizes.zeros, threads, skip_zeros);
}

void run_any(const ConvShape& s, Direction direction, const void* from, const ConvPointers& p, void* workspace,
             int threads) {
  with_type(s.dtype, [&](auto type) { run<decltype(type)>(s, direction, from, p, workspace, threads); });
}

int64_t workspace(const ConvShape& s, Direction direction, int threads) {
  return with_type(s.dtype, [&](auto type) {
    using T = decltype(type);
    Gather g = make_gather(s, direction);
    int64_t words = Workspace(g, dense_kernels<T>(g.to_per_group), s.taps(), threads).elements(threads);
    if (works_on_padding(s)) {
      drop_idle_taps(g);
      words = std::max(words, Workspace(g, dense_kernels<T>(g.to_per_group), s.taps(), threads).elements(threads));
    }
    return words * static_cast<int64_t>(sizeof(Word<T>));
  });
}

}  // namespace

const char* implicit_gemm_forward_decline(const ConvShape& s) { return decline(s); }

const char* implicit_gemm_backward_input_decline(const ConvShape& s) {
  if (s.padding_mode != PaddingMode::kZeros) return "the adjoint of a padding mode";
  double phases = 1;
  for (int d = 0; d < 3; ++d) phases *= static_cast<double>(std::min(s.stride[d], s.in[d]));
  if (phases > kMaxPhases) return "more than 65536 phases";
  return decline(s);
}

int64_t implicit_gemm_forward_workspace(const ConvShape& s, int threads) {
  return workspace(s, Direction::kForward, threads);
}

int64_t implicit_gemm_backward_input_workspace(const ConvShape& s, int threads) {
  return workspace(s, Direction::kBackwardInput, threads);
}

void implicit_gemm_forward(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  run_any(s, Direction::kForward, p.input, p, workspace, threads);
}

void implicit_gemm_backward_input(const ConvShape& s, const ConvPointers& p, void* workspace, int threads) {
  run_any(s, Direction::kBackwardInput, p.grad_output, p, workspace, threads);
}

}  // namespace myconv::cpu
