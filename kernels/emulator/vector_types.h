// CUDA's small vector types, with its alignments: a kernel that casts to them is checked by the
// undefined-behaviour sanitizer as the hardware would check it.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define VLMQ_VECTOR_TYPES(T, name)                                               \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                             \
  struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
  constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                  \
  constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

VLMQ_VECTOR_TYPES(float, float)
VLMQ_VECTOR_TYPES(int, int)
VLMQ_VECTOR_TYPES(unsigned, uint)
VLMQ_VECTOR_TYPES(unsigned short, ushort)
VLMQ_VECTOR_TYPES(unsigned char, uchar)
VLMQ_VECTOR_TYPES(double, double)
#undef VLMQ_VECTOR_TYPES
