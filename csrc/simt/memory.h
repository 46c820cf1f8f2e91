// What the runner knows of memory: the exact bounds of every global buffer, and for shared memory who touched what
// when.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <string>
#include <vector>

namespace locas::simt {

// ---- Global memory -------------------------------------------------------------------------------------------
// None of a launch's blocks may read or write what another one writes, unless a barrier of the whole grid lies between
// the two. Bytes are watched in pairs. read_once: by the read-only path, so nobody may have written it in this launch.
enum class Access { read, read_once, write };

void register_global(const void* data, size_t bytes, std::string name);
void unregister_global(const void* data);
void begin_launch_on_globals(bool programmatic);
void pass_grid_barrier_on_globals();
// Whether one registered buffer holds all of [address, address + bytes).
bool in_global(const void* address, size_t bytes);
// How far from a registered buffer it lies, if in none.
size_t distance_from_global(const void* address);
// Aborts unless a buffer holds all of it, the access does not race with another block's, and, where the thread does not
// know that the launches before have ended, it is safe while they run.
void touch_global(int block, bool knows_launch_before, const void* address, size_t bytes, Access access);

// A global buffer of a test: poisoned with NaN, its exact bounds known to the runner (and to AddressSanitizer).
// `offset` elements lie unused before it, to test pointers that are not 16-byte aligned.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::string name, size_t size, size_t offset = 0) : size_(size), offset_(offset) {
    if (posix_memalign(&allocation_, 256, (offset + size) * sizeof(T) + (size == 0)) != 0) throw std::bad_alloc();
    std::memset(allocation_, 0xff, (offset + size) * sizeof(T));
    register_global(data(), size * sizeof(T), std::move(name));
  }
  Buffer(std::string name, const std::vector<T>& values, size_t offset = 0)
      : Buffer(std::move(name), values.size(), offset) {
    std::memcpy(data(), values.data(), values.size() * sizeof(T));
  }
  ~Buffer() {
    unregister_global(data());
    std::free(allocation_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return static_cast<T*>(allocation_) + offset_; }
  const T* data() const { return static_cast<const T*>(allocation_) + offset_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }
  std::vector<T> values() const { return {data(), data() + size_}; }

 private:
  void* allocation_ = nullptr;
  size_t size_, offset_;
};

// ---- Shared memory -------------------------------------------------------------------------------------------
// Finds races by logical time, so in every schedule and not only in an unlucky one. Each warp counts time; its Clock
// says up to which time of every other warp it has synchronised. An access races if another warp's access to the same
// bytes, one of the two a write, is later than that. Inside a warp, an access of another lane must lie before the last
// sync_warp, barrier or mbarrier wait. Bytes are watched in pairs.
constexpr int kMaxWarps = 32;
using Clock = std::array<uint32_t, kMaxWarps>;
void join(Clock& into, const Clock& other);  // the later of both, warp by warp

enum class Proxy { generic, async };

class SharedMemory {
 public:
  void begin_launch(size_t bytes, int threads);
  void begin_block();  // poisons with NaN; all that was before is long ago
  void end_launch();

  unsigned char* data() const { return data_; }
  bool contains(const void* address) const { return data_ && offset(address) < bytes_; }
  // How far behind the end it lies, where an index went too far.
  size_t distance(const void* address) const { return data_ ? offset(address) - bytes_ : SIZE_MAX; }

  void read(int thread, const void* address, size_t bytes);
  void write(int thread, const void* address, size_t bytes);
  // Between the two, an asynchronous copy is under way and nobody may touch the bytes. The finished copy counts as
  // a write of `thread` at `time`. The asynchronous proxy (bulk copies, wgmma) sees ordinary writes after a fence only.
  void begin_copy(int thread, const void* address, size_t bytes, const char* wait, Proxy proxy);
  void end_copy(int thread, const void* address, size_t bytes, uint32_t time, Proxy proxy);
  // The asynchronous proxy reads 16 bytes, for the threads of `warps` warps from `thread` on, or for that one thread.
  // Between the two nobody may write; the end counts as the read.
  void begin_async_read(int thread, int warps, const void* piece);
  void end_async_read(int thread, int warps, const void* piece);
  void fence_proxy(int thread);
  // The eight bytes of an mbarrier: only mbarrier operations may touch them, ordered after its initialisation.
  void claim_barrier(int thread, const void* address);
  void check_barrier(int thread, const void* address);
  void release_barrier(const void* address);  // at the end of the block

  // What a warp knows, and its own time. tick() begins a new time: what it does next is not covered by what it
  // released before.
  const Clock& clock(int warp) const { return clocks_[warp]; }
  uint32_t time(int warp) const { return clocks_[warp][warp]; }
  void learn(int warp, const Clock& other) { join(clocks_[warp], other); }
  void tick(int warp) { ++clocks_[warp][warp]; }
  void sync_lanes(int warp) { ++epochs_[warp]; }

 private:
  enum class State : uint8_t { plain, copying, barrier };
  struct Cell {  // two bytes
    uint32_t write_time = 0, write_epoch = 0;
    int16_t writer = -1;  // thread
    State state = State::plain;
    bool generic = false;  // not written by the asynchronous proxy
    uint8_t wait = 0;      // index of the name of the wait that ends `copying`
  };
  static constexpr int16_t kSeveral = -2;
  struct Readers {  // the last read by one warp
    uint32_t time = 0, epoch = 0;
    int16_t thread = -1;
  };

  size_t offset(const void* address) const { return static_cast<const unsigned char*>(address) - data_; }
  size_t first_cell(const void* address) const { return offset(address) / 2; }
  size_t end_cell(const void* address, size_t bytes) const { return first_cell(address) + (bytes + 1) / 2; }
  void check_range(const void* address, size_t bytes, Access access) const;
  void check_state(const Cell& cell, size_t index, Access access) const;
  void check_last_write(int thread, const Cell& cell, size_t index, Access access) const;
  void check_readers(int thread, size_t index) const;
  void check_proxy(int thread, const Cell& cell, size_t index, Access access) const;
  void check_async_reads(const void* address, size_t bytes) const;

  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
  int warps_ = 0;
  // Kept from launch to launch: time never goes back, so what is old needs no clearing.
  std::vector<Cell> cells_;
  std::vector<Readers> readers_;  // [cells][warps]
  std::array<Clock, kMaxWarps> clocks_{};
  std::array<uint32_t, kMaxWarps> epochs_{};  // counts what orders the lanes of a warp
  std::vector<const char*> waits_;
  struct Fence {
    uint32_t time, epoch;
  };
  std::vector<std::vector<Fence>> fences_;   // [threads], of this block
  std::vector<uint8_t> async_reads_;         // [pieces of 16 bytes] under way
  std::array<uint32_t, kMaxWarps> begin_{};  // of the block: what is not later needs no fence
};

}  // namespace locas::simt
