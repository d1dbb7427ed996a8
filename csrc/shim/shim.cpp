#include "shim.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>

// Saves the callee-saved registers and the floating-point control words on the current stack, publishes the stack
// pointer in *save and continues on `to`.
extern "C" void vidops_shim_switch(void** save, void* to);
asm(R"(
.text
.globl vidops_shim_switch
.type vidops_shim_switch, @function
vidops_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vidops_shim_switch, . - vidops_shim_switch
)");

namespace shim {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr int kMaxThreads = 1024;
constexpr int kMaxCluster = 8;  // that every device with clusters takes
constexpr size_t kSharedAlign = 1024;
constexpr int kGroupDepth = 16, kGroupRowBytes = 128;

void to_scheduler(Fiber& fiber) { vidops_shim_switch(&fiber.stack_pointer, machine().scheduler_stack); }

void fiber_entry() {
  Machine& m = machine();
  (*m.body)();
  m.current->wait = Wait::done;
  to_scheduler(*m.current);
  std::abort();  // a finished fiber is never resumed
}

void allocate_stack(Fiber& fiber) {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw Fault("no memory for a fiber stack");
  // A kernel that overruns its stack must stop here, not scribble over its neighbour's.
  if (mprotect(stack, 4096, PROT_NONE) != 0) throw Fault("no guard page for a fiber stack");
  fiber.stack = static_cast<char*>(stack);
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) allocate_stack(fiber);
  auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.stack + kStackBytes) & ~uintptr_t{63});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  --top;
  const uint32_t mxcsr = 0x1f80;
  const uint16_t control = 0x37f;
  std::memcpy(top, &mxcsr, sizeof mxcsr);
  std::memcpy(reinterpret_cast<char*>(top) + 4, &control, sizeof control);
  fiber.stack_pointer = top;
  fiber.wait = Wait::ready;
  fiber.op = WarpOp::none;
  fiber.phase = 0;
  fiber.open.clear();
  fiber.groups.clear();
  fiber.arrived = false;
  fiber.open_products.clear();
  fiber.products.clear();
}

Index place(const Machine& m, unsigned id) {
  return {id % m.grid.x, id / m.grid.x % m.grid.y, id / m.grid.x / m.grid.y};
}

int poison(const Machine& m) { return m.seed % 2 ? 0xcb : 0xff; }

// Runs one block, or the blocks of one cluster.
class Scheduler {
 public:
  Scheduler(Machine& m, unsigned first_block, const char* kernel)
      : m_(m), rng_(m.seed * 7919u + first_block), kernel_(kernel), first_block_(first_block),
        total_(m.threads * m.cluster), done_(static_cast<size_t>(m.cluster)) {
    warps_.resize(total_ / kWarp);
    std::iota(warps_.begin(), warps_.end(), 0);
  }

  void run() {
    hold_back();
    while (std::accumulate(done_.begin(), done_.end(), 0) < total_) {
      bool progress = false;
      if (m_.seed) std::shuffle(warps_.begin(), warps_.end(), rng_);
      for (int warp : warps_)
        if (runs(warp * kWarp / m_.threads)) progress |= run_warp(warp);
      for (int rank = 0; rank < m_.cluster; ++rank)
        if (runs(rank)) progress |= release(Wait::block, rank * m_.threads, m_.threads, "a block barrier");
      if (release(Wait::cluster, 0, total_, "a cluster barrier")) {
        progress = true;
        hold_back();
      }
      if (!progress && !held_back_) throw Fault(describe("deadlock"));
      if (!progress) held_back_ = 0;
    }
    for (int i = 0; i < total_; ++i) {
      const Fiber& f = m_.fibers[i];
      if (!f.open.empty()) throw Fault(describe("asynchronous copies were never committed"));
      if (!f.open_products.empty() || !f.products.empty())
        throw Fault(describe("products of a warpgroup were never waited for"));
    }
  }

 private:
  // What is read from another block goes wrong, if it can, while blocks are far apart.
  void hold_back() {
    if (m_.seed >= 100 && m_.cluster > 1) held_back_ = static_cast<unsigned>(rng_());
  }

  bool runs(int rank) const { return !(held_back_ >> rank & 1); }

  bool run_warp(int warp) {
    const int first = warp * kWarp, last = first + kWarp;
    int budget = m_.seed >= 100 ? 1 + static_cast<int>(rng_() % 400) : 1;
    bool progress = false;
    for (bool again = true; again && budget > 0; --budget) {
      again = false;
      for (int i = first; i < last; ++i) {
        if (m_.fibers[i].wait != Wait::ready) continue;
        step(m_.fibers[i]);
        progress = true;
      }
      if (release_warp(first, last)) again = progress = true;
    }
    return progress;
  }

  void step(Fiber& fiber) {
    m_.current = &fiber;
    m_.shared = m_.cluster_shared[fiber.rank];
    m_.block = place(m_, first_block_ + fiber.rank);
    vidops_shim_switch(&m_.scheduler_stack, fiber.stack_pointer);
    if (fiber.wait == Wait::done && ++done_[fiber.rank] == m_.threads && m_.cluster > 1)
      std::memset(m_.shared, poison(m_), m_.shared_bytes);  // whoever still reads there comes too late
    if (fiber.wait == Wait::faulted) throw Fault(describe(m_.fault));
  }

  bool release_warp(int first, int last) {
    int waiting = 0, finished = 0;
    WarpOp op = WarpOp::none;
    for (int i = first; i < last; ++i) {
      const Fiber& f = m_.fibers[i];
      finished += f.wait == Wait::done;
      if (f.wait != Wait::warp) continue;
      ++waiting;
      if (op == WarpOp::none) op = f.op;
      if (f.op != op) throw Fault(describe("lanes of one warp are in different warp operations"));
    }
    if (waiting == 0 || waiting != last - first) {
      if (waiting && waiting + finished == last - first)
        throw Fault(describe("a full-mask warp operation after some lanes have left"));
      return false;
    }
    for (int i = first; i < last; ++i) m_.fibers[i].wait = Wait::ready;
    return true;
  }

  // Opens a barrier when all of its threads have come.
  bool release(Wait barrier, int first, int count, const char* what) {
    int waiting = 0, finished = 0;
    for (int i = first; i < first + count; ++i) {
      waiting += m_.fibers[i].wait == barrier;
      finished += m_.fibers[i].wait == Wait::done;
    }
    if (waiting && finished && waiting + finished == count)
      throw Fault(describe(std::string(what) + " after some threads have left"));
    if (waiting != count) return false;
    for (int i = first; i < first + count; ++i) m_.fibers[i].wait = Wait::ready;
    return true;
  }

  std::string describe(const std::string& what) const {
    const auto count = [&](Wait wait) {
      const auto end = m_.fibers.begin() + total_;
      return std::to_string(std::count_if(m_.fibers.begin(), end, [&](const Fiber& f) { return f.wait == wait; }));
    };
    return std::string(kernel_) + ", block " + std::to_string(first_block_) + ": " + what + " (ready " +
           count(Wait::ready) + ", at block barrier " + count(Wait::block) + ", at cluster barrier " +
           count(Wait::cluster) + ", at warp operation " + count(Wait::warp) + ", done " + count(Wait::done) + ")";
  }

  Machine& m_;
  std::mt19937 rng_;
  const char* kernel_;
  unsigned first_block_;
  int total_;               // threads of the cluster
  unsigned held_back_ = 0;  // blocks of the cluster, a bit each, that wait until the others cannot go on
  std::vector<int> done_;   // threads that have left, by block
  std::vector<int> warps_;
};

}  // namespace

Machine& machine() {
  static Machine instance;
  return instance;
}

void launch(Index grid, Index block, size_t shared_bytes, const std::function<void()>& kernel, const char* name,
            int cluster) {
  Machine& m = machine();
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || threads % kWarp || blocks == 0)
    throw Fault(std::string(name) + ": launch shape not allowed");
  if (grid.x > 0x7fffffffu || grid.y > 65535u || grid.z > 65535u)
    throw Fault(std::string(name) + ": grid too large");
  if (cluster < 1 || cluster > kMaxCluster || grid.x % static_cast<unsigned>(cluster))
    throw Fault(std::string(name) + ": clusters of this size do not divide the grid");
  if (shared_bytes > machine().shared_limit) throw Fault(std::string(name) + ": too much shared memory");

  m.grid = grid;
  m.block_size = block;
  m.threads = static_cast<int>(threads);
  m.cluster = cluster;
  m.shared_bytes = shared_bytes;
  m.body = &kernel;
  const size_t together = threads * static_cast<size_t>(cluster);
  if (m.fibers.size() < together) m.fibers.resize(together);
  m.exchange.resize(together / kWarp);

  std::vector<uint32_t> order(blocks / static_cast<unsigned>(cluster));
  std::iota(order.begin(), order.end(), 0u);
  if (m.seed) {
    std::mt19937 rng(m.seed);
    std::shuffle(order.begin(), order.end(), rng);
  }
  for (uint32_t id : order) {
    const uint32_t first = id * static_cast<unsigned>(cluster);
    // Exactly the bytes asked for, from the heap: the address sanitizer sees an overrun of shared memory too.
    std::vector<std::unique_ptr<char, void (*)(void*)>> shared;
    m.cluster_shared.clear();
    for (int rank = 0; rank < cluster; ++rank) {
      void* memory = nullptr;
      if (shared_bytes && posix_memalign(&memory, kSharedAlign, shared_bytes) != 0) throw Fault("no shared memory");
      shared.emplace_back(static_cast<char*>(memory), std::free);
      if (shared_bytes) std::memset(memory, poison(m), shared_bytes);
      m.cluster_shared.push_back(shared.back().get());
    }
    for (size_t i = 0; i < together; ++i) {
      Fiber& f = m.fibers[i];
      const auto within = static_cast<unsigned>(i % threads);
      f.linear = static_cast<int>(i);
      f.rank = static_cast<int>(i / threads);
      f.thread = {within % block.x, within / block.x % block.y, within / block.x / block.y};
      prepare(f);
    }
    Scheduler(m, first, name).run();
  }
}

void block_barrier() {
  Fiber& f = *machine().current;
  f.wait = Wait::block;
  to_scheduler(f);
}

void cluster_barrier() {
  Fiber& f = *machine().current;
  f.wait = Wait::cluster;
  to_scheduler(f);
}

void* cluster_address(const void* own, int rank) {
  Machine& m = machine();
  const auto* at = static_cast<const char*>(own);
  if (rank < 0 || rank >= m.cluster) fail("no block of this rank in the cluster");
  if (at < m.shared || at >= m.shared + m.shared_bytes) fail("not an address of the block's shared memory");
  return m.cluster_shared[rank] + (at - m.shared);
}

void warp_barrier(WarpOp op) {
  Fiber& f = *machine().current;
  f.wait = Wait::warp;
  f.op = op;
  f.phase ^= 1u;
  to_scheduler(f);
}

void fail(const std::string& what) {
  Machine& m = machine();
  m.fault = what;
  m.current->wait = Wait::faulted;
  to_scheduler(*m.current);
  std::abort();  // a faulted fiber is never resumed
}

static void perform(const Copy& copy) {
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

void copy_async(void* to, const void* from, int bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15)
    fail("asynchronous 16-byte copy is not aligned");
  const Copy copy{to, from, bytes};
  if (machine().seed % 2)
    perform(copy);
  else
    machine().current->open.push_back(copy);
}

void copy_commit() {
  Fiber& f = *machine().current;
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

void copy_wait(int allowed) {
  auto& groups = machine().current->groups;
  while (groups.size() > static_cast<size_t>(allowed)) {
    for (const Copy& copy : groups.front()) perform(copy);
    groups.erase(groups.begin());
  }
}

void load_matrix(uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) & 15) fail("ldmatrix row address is not aligned");
  Machine& m = machine();
  Fiber& f = *m.current;
  Exchange& e = m.exchange[f.warp()];
  const unsigned slot = f.phase;
  const int lane = f.lane(), group = lane / 4, pair = lane % 4 * 2;
  e.address[slot][lane] = row;
  warp_barrier(WarpOp::ldmatrix);
  for (int matrix = 0; matrix < 4; ++matrix) {
    auto element = [&](int i, int j) {
      return static_cast<const uint16_t*>(e.address[slot][matrix * 8 + i])[j];
    };
    const uint32_t low = transposed ? element(pair, group) : element(group, pair);
    const uint32_t high = transposed ? element(pair + 1, group) : element(group, pair + 1);
    r[matrix] = low | high << 16;
  }
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*decode)(uint16_t)) {
  Machine& m = machine();
  Fiber& f = *m.current;
  Exchange& e = m.exchange[f.warp()];
  const unsigned slot = f.phase;
  const int lane = f.lane(), group = lane / 4, pair = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    float* to = &e.a[slot][group + i % 2 * 8][pair + i / 2 * 8];
    to[0] = decode(static_cast<uint16_t>(a[i]));
    to[1] = decode(static_cast<uint16_t>(a[i] >> 16));
  }
  for (int i = 0; i < 2; ++i) {
    e.b[slot][pair + i * 8][group] = decode(static_cast<uint16_t>(b[i]));
    e.b[slot][pair + i * 8 + 1][group] = decode(static_cast<uint16_t>(b[i] >> 16));
  }
  warp_barrier(WarpOp::mma);
  const float(&left)[16][16] = e.a[slot];
  const float(&right)[16][8] = e.b[slot];
  for (int k = 0; k < 16; ++k) {
    const float b0 = right[k][pair], b1 = right[k][pair + 1];
    c[0] += left[group][k] * b0;
    c[1] += left[group][k] * b1;
    c[2] += left[group + 8][k] * b0;
    c[3] += left[group + 8][k] * b1;
  }
}

void multiply_add_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Machine& m = machine();
  Fiber& f = *m.current;
  Exchange& e = m.exchange[f.warp()];
  const unsigned slot = f.phase;
  const int lane = f.lane(), group = lane / 4, place = lane % 4;
  const auto decode = [](uint32_t bits) {
    bits &= 0xffffe000u;
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  };
  for (int i = 0; i < 4; ++i) e.a[slot][group + i % 2 * 8][place + i / 2 * 4] = decode(a[i]);
  for (int i = 0; i < 2; ++i) e.b[slot][place + i * 4][group] = decode(b[i]);
  warp_barrier(WarpOp::mma);
  for (int k = 0; k < 8; ++k)
    for (int i = 0; i < 4; ++i)
      c[i] += e.a[slot][group + i / 2 * 8][k] * e.b[slot][k][place * 2 + i % 2];
}

void group_arrive() {
  warp_barrier(WarpOp::group);
  machine().current->arrived = true;
}

// Piece k of 16 bytes lies at k ^ (row % 8); addresses count from a multiple of 1024 bytes.
static const uint16_t* group_element(const void* from, int row, int column) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(row * kGroupRowBytes + column * 2);
  return reinterpret_cast<const uint16_t*>(at ^ (at >> 7 & 7) << 4);
}

static void perform(const GroupProduct& p, const Fiber& f) {
  const int lane = f.lane(), first = f.warp() % 4 * 16 + lane / 4;
  float left[2][kGroupDepth];
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < kGroupDepth; ++k) left[half][k] = p.decode(*group_element(p.a, first + half * 8, k));
  for (int strip = 0; strip < p.strips; ++strip)
    for (int side = 0; side < 2; ++side) {
      float* const c = p.c[strip] + side;
      float sum[2] = {p.add ? c[0] : 0, p.add ? c[2] : 0};
      for (int k = 0; k < kGroupDepth; ++k) {
        const float right = p.decode(*group_element(p.b, strip * 8 + lane % 4 * 2 + side, k));
        sum[0] += left[0][k] * right;
        sum[1] += left[1][k] * right;
      }
      c[0] = sum[0];
      c[2] = sum[1];
    }
}

void group_multiply(float (*c)[4], int strips, const void* a, const void* b, bool add, float (*decode)(uint16_t)) {
  Fiber& f = *machine().current;
  if (!f.arrived) fail("a product of a warpgroup before it arrived");
  if ((reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) & 31)
    fail("an operand of a warpgroup's product is not aligned");
  warp_barrier(WarpOp::group);
  const GroupProduct product{c, strips, a, b, add, decode};
  if (machine().seed % 2)
    perform(product, f);
  else
    f.open_products.push_back(product);
}

void group_commit() {
  Fiber& f = *machine().current;
  f.arrived = false;
  f.products.push_back(std::move(f.open_products));
  f.open_products.clear();
}

void group_wait(int allowed) {
  Fiber& f = *machine().current;
  while (f.products.size() > static_cast<size_t>(allowed)) {
    for (const GroupProduct& product : f.products.front()) perform(product, f);
    f.products.erase(f.products.begin());
  }
}

uint32_t vote(bool predicate) {
  Machine& m = machine();
  Fiber& f = *m.current;
  Exchange& e = m.exchange[f.warp()];
  const unsigned slot = f.phase;
  e.word[slot][f.lane()] = predicate;
  warp_barrier(WarpOp::ballot);
  uint32_t mask = 0;
  for (int i = 0; i < kWarp; ++i) mask |= static_cast<uint32_t>(e.word[slot][i] & 1) << i;
  return mask;
}

}  // namespace shim
