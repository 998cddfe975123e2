// The types of tensors and what they are multiplied as. Plain structs, as microkernels.h says.
#pragma once

#include <cstdint>

namespace myconv::cpu {

// The 16-bit types as they are stored. They are multiplied as words of 4 bytes, into which they are packed: each a
// float32, or where the processor multiplies them itself, a pair of bfloat16 values that follow each other in depth
// (the second is zero behind an odd depth). A word travels as a float whatever its bits mean. Sums are float32.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// What a stored type is multiplied as.
template <typename T>
struct WordOf {
  using type = T;
};
template <>
struct WordOf<bfloat16> {
  using type = float;
};
template <>
struct WordOf<float16> {
  using type = float;
};
template <typename T>
using Word = typename WordOf<T>::type;
template <typename T>
inline constexpr bool kIsHalf = sizeof(T) == 2;

}  // namespace myconv::cpu
