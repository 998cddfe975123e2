// Instructions that CUDA C++ has no word for, one function each, included by device.cuh. tests/emulator/instructions.h
// has the same functions for the emulator.
//
// All 32 lanes of a warp call mma_* and ldmatrix together. Of the matrices each lane holds a fragment, where g is
// lane / 4, i is lane % 4, and a register of 16-bit elements has two, the first in its low half:
//
//                          a[0]            a[1]              a[2]              a[3]
//   m16n8k16   A (row, k)  (g, 2i..2i+1)   (g + 8, 2i..)     (g, 2i + 8..)     (g + 8, 2i + 8..)
//   m16n8k8    A (row, k)  (g, i)          (g + 8, i)        (g, i + 4)        (g + 8, i + 4)
//
//                          b[0]            b[1]
//   m16n8k16   B (k, col)  (2i..2i+1, g)   (2i + 8.., g)
//   m16n8k8    B (k, col)  (i, g)          (i + 4, g)
//
//                          d[0]            d[1]              d[2]              d[3]
//   both       D (row,col) (g, 2i)         (g, 2i + 1)       (g + 8, 2i)       (g + 8, 2i + 1)
#pragma once

#include <cstdint>

namespace myconv::cuda {

// D += A * B in float32.
__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest tf32, ties away from zero: what mma_tf32 takes.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Loads four 8x8 matrices of 16-bit elements from shared memory. Lane 8 * m + r names row r of matrix m: 16 bytes, at a
// multiple of 16. Of matrix m a lane gets (g, 2i..2i+1) into r[m]; transposed, (2i..2i+1, g).
__device__ inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts to copy kBytes (4, 8 or 16) to shared memory: the first `valid` of them from `from`, zeros behind. Both
// addresses are multiples of kBytes. The data is there for the calling thread once it has waited for the group.
template <int kBytes>
__device__ inline void cp_async(void* to, const void* from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16)  // past L1
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared_address(to)), "l"(from), "n"(kBytes), "r"(valid)
                 : "memory");
}

// Closes a group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until all groups but the newest kGroupsLeft are there.
template <int kGroupsLeft>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kGroupsLeft) : "memory");
}

}  // namespace myconv::cuda
