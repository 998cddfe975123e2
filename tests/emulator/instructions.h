// The functions of csrc/cuda/instructions.cuh, where the layout of the fragments is described, for the emulator.
//
// A product of matrices is summed in double and rounded to float32 once. A GPU rounds in another way, which its
// documentation leaves open: values agree to within roundings, bits need not.
#pragma once

#include "cuda/device.cuh"

namespace myconv::cuda {
namespace emulator {

void start_copy(void* to, const void* from, int bytes, int valid);
void commit_copies();
void await_copies(int groups_left);

inline uint16_t half_of(uint32_t bits, int i) { return static_cast<uint16_t>(bits >> 16 * i); }

// Element `i` of the register: there are two of 16 bits or one of 32.
struct F16 {
  static constexpr int kPerRegister = 2;
  static float element(uint32_t bits, int i) { return load(Half{half_of(bits, i)}); }
};
struct Bf16 {
  static constexpr int kPerRegister = 2;
  static float element(uint32_t bits, int i) { return load(BFloat16{half_of(bits, i)}); }
};
struct Tf32 {
  static constexpr int kPerRegister = 1;
  static float element(uint32_t bits, int) { return float_of_bits(bits & ~0x1fffu); }  // 10 bits of the fraction
};

// One rule for both shapes: with e elements a register, register j of A stands at row g + 8 * (j % 2) and columns from
// e * (i + 4 * (j / 2)) on, register j of B at rows from e * (i + 4 * j) on and column g.
template <typename Type>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place place) {
  struct Record {
    float (&d)[4];
    const uint32_t (&a)[4], (&b)[2];
  } mine{d, a, b};
  meet_warp(
      ~0u, mine,
      [](Records<Record> lanes) {
        constexpr int kPer = Type::kPerRegister, kDepth = 8 * kPer;
        float a[16][kDepth], b[kDepth][8];
        for (int lane = 0; lane < 32; ++lane)
          for (int e = 0; e < kPer; ++e) {
            const int g = lane / 4, i = lane % 4;
            for (int j = 0; j < 4; ++j)
              a[g + 8 * (j % 2)][kPer * (i + 4 * (j / 2)) + e] = Type::element(lanes[lane]->a[j], e);
            for (int j = 0; j < 2; ++j) b[kPer * (i + 4 * j) + e][g] = Type::element(lanes[lane]->b[j], e);
          }
        for (int lane = 0; lane < 32; ++lane)
          for (int j = 0; j < 4; ++j) {
            const int row = lane / 4 + 8 * (j / 2), column = 2 * (lane % 4) + j % 2;
            double sum = lanes[lane]->d[j];
            for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
            lanes[lane]->d[j] = static_cast<float>(sum);
          }
      },
      place);
}

template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const void* row, Place place) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("gives ldmatrix a row that is not at a multiple of 16 bytes");
  struct Record {
    uint32_t (&r)[4];
    uint16_t row[8];
  } mine{r, {}};
  memcpy(mine.row, row, sizeof mine.row);  // before the others come: what they have yet to write must not be there
  meet_warp(
      ~0u, mine,
      [](Records<Record> lanes) {
        for (int lane = 0; lane < 32; ++lane)
          for (int m = 0; m < 4; ++m) {
            const int g = lane / 4, i = lane % 4;
            const auto at = [&](int row, int column) -> uint32_t { return lanes[8 * m + row]->row[column]; };
            lanes[lane]->r[m] =
                kTransposed ? at(2 * i, g) | at(2 * i + 1, g) << 16 : at(g, 2 * i) | at(g, 2 * i + 1) << 16;
          }
      },
      place);
}

}  // namespace emulator

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Place place = {}) {
  emulator::mma<emulator::F16>(d, a, b, place);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Place place = {}) {
  emulator::mma<emulator::Bf16>(d, a, b, place);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], emulator::Place place = {}) {
  emulator::mma<emulator::Tf32>(d, a, b, place);
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = bits_of_float(value);
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  return (finite ? bits + 0x1000 : bits) & ~0x1fffu;
}

inline void ldmatrix(uint32_t (&r)[4], const void* row, emulator::Place place = {}) {
  emulator::load_matrices<false>(r, row, place);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row, emulator::Place place = {}) {
  emulator::load_matrices<true>(r, row, place);
}

template <int kBytes>
void cp_async(void* to, const void* from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::start_copy(to, from, kBytes, valid);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kGroupsLeft>
void cp_async_wait() {
  emulator::await_copies(kGroupsLeft);
}

}  // namespace myconv::cuda
