// What the lanes of a warp do together. csrc/cuda/ptx/ says what each returns.
#pragma once

#include <cstdint>

namespace locas::simt {

// T is float or double.
template <class T>
T shuffle(const char* name, T value, int source_lane);

// Four matrices.
void ldmatrix(uint32_t (&registers)[4], const void* row, bool transposed);

void stmatrix(void* row, const uint32_t (&registers)[4]);

uint32_t movmatrix_trans(uint32_t pair);

// How many times more than once shared memory had to be accessed for a matrix, of all ldmatrix and stmatrix so far: bank
// conflicts.
uint64_t ldmatrix_conflicts();

enum class Half { bf16, f16 };
void mma_m16n8k16(Half type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace locas::simt
