// Runs block-synchronous CUDA kernels on the host, for tests only: one stackful fiber per CUDA thread, switched
// at every barrier and warp operation. The order in which fibers run is chosen by a seed, so that an ordering that
// happens to work on one schedule is met by others:
//   seed 0        lock-step, warps in order
//   seeds 1..99   warps shuffled before every round
//   seeds >= 100  shuffled and skewed: a warp may run far ahead of its block, and a block of its cluster
// Odd seeds complete asynchronous copies and the products of a warpgroup at once, even seeds as late as their waits
// allow. Shared memory starts poisoned. A deadlock, a barrier that not all threads reach, or lanes of a warp in different
// warp operations end the launch with shim::Fault instead of hanging. The blocks of a cluster run together, their warps
// in one order; one that has left leaves poison behind.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "the host shim switches stacks with x86-64 System V code"
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace shim {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// What a fiber waits for. A warp operation carries its kind, so that lanes in different ones are told apart.
enum class Wait : int { ready, block, warp, cluster, done, faulted };
enum class WarpOp : int { none, sync, shuffle, ballot, ldmatrix, mma, group };

struct Copy {
  void* to;
  const void* from;
  int bytes;  // what is copied; the rest of the 16 bytes is zero-filled
};

// This thread's part of a product of its warpgroup.
struct GroupProduct {
  float (*c)[4];
  int strips;
  const void *a, *b;
  bool add;
  float (*decode)(uint16_t);
};

constexpr int kWarp = 32;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Index thread{0, 0, 0};
  int linear = 0;  // in the cluster
  int rank = 0;    // of its block in the cluster
  Wait wait = Wait::ready;
  WarpOp op = WarpOp::none;
  unsigned phase = 0;  // parity of the exchange slot that the next warp operation uses
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  bool arrived = false;
  std::vector<GroupProduct> open_products;
  std::vector<std::vector<GroupProduct>> products;

  int warp() const { return linear / kWarp; }
  int lane() const { return linear % kWarp; }
};

// Two slots per warp: a lane that is one operation ahead writes the other slot, so one switch per operation is
// enough.
struct Exchange {
  uint64_t word[2][kWarp];
  const void* address[2][kWarp];
  float a[2][16][16];
  float b[2][16][8];
};

struct Machine {
  unsigned seed = 0;
  size_t shared_limit = 227 * 1024;  // of a block, as on Hopper
  int multiprocessors = 2;           // what launchers are told
  Fiber* current = nullptr;
  void* scheduler_stack = nullptr;
  Index block{0, 0, 0}, block_size, grid;  // `block` and `shared` are those of the current fiber
  int threads = 0;                         // of a block
  int cluster = 1;                         // blocks, side by side on axis x
  std::vector<Fiber> fibers;
  std::vector<Exchange> exchange;
  char* shared = nullptr;
  std::vector<char*> cluster_shared;  // by rank
  size_t shared_bytes = 0;            // of a block
  std::string fault;
  const std::function<void()>* body = nullptr;
};

Machine& machine();

// Runs kernel() once per thread of every block. Throws Fault.
void launch(Index grid, Index block, size_t shared_bytes, const std::function<void()>& kernel, const char* name,
            int cluster = 1);

// The operations below are called from kernels.
void block_barrier();
void cluster_barrier();
// The place in the shared memory of block `rank` that corresponds to `own`.
void* cluster_address(const void* own, int rank);
void warp_barrier(WarpOp op);
[[noreturn]] void fail(const std::string& what);
void copy_async(void* to, const void* from, int bytes);
void copy_commit();
void copy_wait(int allowed);
void load_matrix(uint32_t (&r)[4], const void* row, bool transposed);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*decode)(uint16_t));
void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void group_arrive();
void group_multiply(float (*c)[4], int strips, const void* a, const void* b, bool add, float (*decode)(uint16_t));
void group_commit();
void group_wait(int allowed);

template <class T>
T exchange_from(T value, int source) {
  static_assert(sizeof(T) <= 8, "at most one 64-bit word per lane");
  Machine& m = machine();
  Fiber& f = *m.current;
  Exchange& e = m.exchange[f.warp()];
  const unsigned slot = f.phase;
  std::memcpy(&e.word[slot][f.lane()], &value, sizeof value);
  warp_barrier(WarpOp::shuffle);
  T result;
  std::memcpy(&result, &e.word[slot][source & (kWarp - 1)], sizeof result);
  return result;
}

uint32_t vote(bool predicate);

}  // namespace shim
