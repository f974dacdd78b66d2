// Attributes of the C++ twins' hot loops.

#pragma once

// Compiles a function for AVX2 with FMA and for AVX-512 as well and lets the loader choose, so that
// one binary runs on every x86-64 and uses 256-bit and 512-bit vectors where there are any.
#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define ACCEL_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ACCEL_CLONES
#endif

// What a cloned function calls must become part of it, or it runs at the default instruction set.
#if defined(__GNUC__)
#define ACCEL_INLINE inline __attribute__((always_inline))
#define ACCEL_INLINE_LAMBDA __attribute__((always_inline))
#else
#define ACCEL_INLINE inline
#define ACCEL_INLINE_LAMBDA
#endif
