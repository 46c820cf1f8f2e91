#include "simt/memory.h"

#include <algorithm>

#include "simt/runner.h"

namespace locas::simt {
namespace {

constexpr int kNobody = -1, kSeveral = -2;

struct GlobalCell {  // two bytes; blocks that touched them in `phase`
  uint32_t phase = 0;
  int writer = kNobody, reader = kNobody;
  uint32_t written = 0, read = 0;  // by this launch last; 0: by none
};

struct Global {
  size_t bytes;
  std::string name;
  std::vector<GlobalCell> cells;
};

std::map<const unsigned char*, Global>& globals() {
  static std::map<const unsigned char*, Global> buffers;
  return buffers;
}

uint32_t launch = 0;
uint32_t phase = 0;  // a launch, or what lies between two barriers of its grid
uint32_t chain = 0;  // the last launch that was not programmatic: all before it had ended

const char* verb(Access access) { return access == Access::write ? "writes" : "reads"; }

// For a thread that has not waited: the launches of the chain may still run.
void check_ended(const GlobalCell& cell, Access access, size_t byte, const char* name) {
  const auto runs = [](uint32_t of) { return of > 0 && of >= chain && of < launch; };
  if (!runs(cell.written) && !(access == Access::write && runs(cell.read))) return;
  fail("%s byte %zu of '%s', which a launch before %s, without having waited for it", verb(access), byte, name,
       runs(cell.written) ? "wrote" : "read");
}

// The last buffer that begins at or before the address: the only one that can hold it.
std::pair<const unsigned char* const, Global>* buffer_before(const void* address) {
  const auto behind = globals().upper_bound(static_cast<const unsigned char*>(address));
  return behind == globals().begin() ? nullptr : &*std::prev(behind);
}

}  // namespace

void register_global(const void* data, size_t bytes, std::string name) {
  globals()[static_cast<const unsigned char*>(data)] = {bytes, std::move(name),
                                                        std::vector<GlobalCell>((bytes + 1) / 2)};
}

void unregister_global(const void* data) { globals().erase(static_cast<const unsigned char*>(data)); }

void begin_launch_on_globals(bool programmatic) {
  ++launch;
  ++phase;
  if (!programmatic) chain = launch;
}

void pass_grid_barrier_on_globals() { ++phase; }

bool in_global(const void* address, size_t bytes) {
  const auto* buffer = buffer_before(address);
  return buffer && static_cast<const unsigned char*>(address) + bytes <= buffer->first + buffer->second.bytes;
}

size_t distance_from_global(const void* address) {
  const auto* at = static_cast<const unsigned char*>(address);
  const auto* before = buffer_before(address);
  const auto behind = globals().upper_bound(at);
  const size_t past_end = before ? at - before->first - before->second.bytes : SIZE_MAX;
  const size_t until_begin = behind == globals().end() ? SIZE_MAX : behind->first - at;
  return std::min(past_end, until_begin);
}

void touch_global(int block, bool knows_launch_before, const void* address, size_t bytes, Access access) {
  auto* buffer = buffer_before(address);
  if (!buffer) fail("%s %zu bytes at %p, outside every buffer", verb(access), bytes, address);
  auto& [begin, global] = *buffer;
  const size_t offset = static_cast<const unsigned char*>(address) - begin;
  const char* name = global.name.c_str();
  if (offset + bytes > global.bytes)
    fail(
        "%s %zu bytes at %p, outside every buffer: the last one before it is '%s', %zu bytes, and this is byte %zu of "
        "it",
        verb(access), bytes, address, name, global.bytes, offset);
  for (size_t i = offset / 2; i < (offset + bytes + 1) / 2; ++i) {
    GlobalCell& cell = global.cells[i];
    if (cell.phase != phase) cell = {phase, kNobody, kNobody, cell.written, cell.read};
    if (!knows_launch_before) check_ended(cell, access, 2 * i, name);
    if (cell.writer != kNobody && cell.writer != block)
      fail("race: %s byte %zu of '%s', which block %d of the same launch wrote", verb(access), 2 * i, name,
           cell.writer);
    if (access == Access::read_once && cell.written == launch)
      fail("reads byte %zu of '%s' by the read-only path, but this launch wrote it", 2 * i, name);
    if (access == Access::write && cell.reader != kNobody && cell.reader != block)
      fail("race: writes byte %zu of '%s', which another block of the same launch read", 2 * i, name);
    if (access == Access::write) {
      cell.writer = block;
      cell.written = launch;
    } else {
      cell.reader = cell.reader == kNobody || cell.reader == block ? block : kSeveral;
      cell.read = launch;
    }
  }
}

void join(Clock& into, const Clock& other) {
  for (int warp = 0; warp < kMaxWarps; ++warp) into[warp] = std::max(into[warp], other[warp]);
}

void SharedMemory::begin_launch(size_t bytes, int threads) {
  bytes_ = bytes;
  warps_ = threads / 32;
  if (bytes > 0) {
    void* allocation;
    if (posix_memalign(&allocation, 1024, bytes) != 0) throw std::bad_alloc();
    data_ = static_cast<unsigned char*>(allocation);
  }
  const size_t cells = (bytes + 1) / 2;
  if (cells_.size() < cells) cells_.resize(cells);
  if (readers_.size() < cells * warps_) readers_.resize(cells * warps_);
}

void SharedMemory::begin_block() {
  if (bytes_ > 0) std::memset(data_, 0xff, bytes_);
  // All warps begin later than anything that was before, and know nothing of each other.
  uint32_t latest = 0, epoch = 0;
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    latest = std::max(latest, time(warp));
    epoch = std::max(epoch, epochs_[warp]);
  }
  for (int warp = 0; warp < kMaxWarps; ++warp) {
    clocks_[warp].fill(latest);
    tick(warp);
  }
  epochs_.fill(epoch + 1);
  for (int warp = 0; warp < kMaxWarps; ++warp) begin_[warp] = time(warp);
  fences_.assign(warps_ * 32, {});
  async_reads_.assign((bytes_ + 15) / 16, 0);
}

void SharedMemory::end_launch() {
  std::free(data_);
  data_ = nullptr;
  bytes_ = 0;
}

void SharedMemory::check_range(const void* address, size_t bytes, Access access) const {
  if (!contains(address) || offset(address) + bytes > bytes_)
    fail("%s %zu bytes at byte %td of shared memory, which has %zu bytes", verb(access), bytes,
         static_cast<ptrdiff_t>(offset(address)), bytes_);
}

void SharedMemory::check_state(const Cell& cell, size_t index, Access access) const {
  if (cell.state == State::copying)
    fail("%s byte %zu of shared memory while an asynchronous copy into it is under way (no %s yet)", verb(access),
         index * 2, waits_[cell.wait]);
  if (cell.state == State::barrier)
    fail("%s byte %zu of shared memory, which is in an mbarrier", verb(access), index * 2);
}

void SharedMemory::check_last_write(int thread, const Cell& cell, size_t index, Access access) const {
  if (cell.writer < 0 || cell.writer == thread) return;
  const int warp = thread / 32, writer = cell.writer / 32;
  const bool ordered = writer == warp ? cell.write_epoch < epochs_[warp] : cell.write_time <= clocks_[warp][writer];
  if (!ordered)
    fail("race: %s byte %zu of shared memory, which thread %d wrote; nothing synchronises the two", verb(access),
         index * 2, cell.writer);
}

void SharedMemory::check_readers(int thread, size_t index) const {
  const int warp = thread / 32;
  for (int reader = 0; reader < warps_; ++reader) {
    const Readers& last = readers_[index * warps_ + reader];
    if (last.thread == -1 || last.thread == thread) continue;
    const bool ordered = reader == warp ? last.epoch < epochs_[warp] : last.time <= clocks_[warp][reader];
    if (!ordered)
      fail("race: writes byte %zu of shared memory, which warp %d read; nothing synchronises the two", index * 2,
           reader);
  }
}

void SharedMemory::read(int thread, const void* address, size_t bytes) {
  check_range(address, bytes, Access::read);
  const int warp = thread / 32;
  for (size_t i = first_cell(address); i < end_cell(address, bytes); ++i) {
    check_state(cells_[i], i, Access::read);
    check_last_write(thread, cells_[i], i, Access::read);
    Readers& last = readers_[i * warps_ + warp];
    const bool another = last.epoch == epochs_[warp] && last.thread != -1 && last.thread != thread;
    last = {time(warp), epochs_[warp], another ? kSeveral : static_cast<int16_t>(thread)};
  }
}

void SharedMemory::write(int thread, const void* address, size_t bytes) {
  check_range(address, bytes, Access::write);
  check_async_reads(address, bytes);
  const int warp = thread / 32;
  for (size_t i = first_cell(address); i < end_cell(address, bytes); ++i) {
    check_state(cells_[i], i, Access::write);
    check_last_write(thread, cells_[i], i, Access::write);
    check_readers(thread, i);
    cells_[i].writer = static_cast<int16_t>(thread);
    cells_[i].write_time = time(warp);
    cells_[i].write_epoch = epochs_[warp];
    cells_[i].generic = true;
  }
}

void SharedMemory::check_async_reads(const void* address, size_t bytes) const {
  for (size_t piece = offset(address) / 16; piece < (offset(address) + bytes + 15) / 16; ++piece)
    if (async_reads_[piece] > 0)
      fail("writes byte %zu of shared memory, which a wgmma or a bulk store is still reading", piece * 16);
}

void SharedMemory::check_proxy(int thread, const Cell& cell, size_t index, Access access) const {
  if (!cell.generic || cell.writer < 0 || cell.write_time < begin_[cell.writer / 32]) return;
  const auto& fences = fences_[cell.writer];
  const auto fence = std::lower_bound(fences.begin(), fences.end(), cell.write_time,
                                      [](const Fence& fence, uint32_t time) { return fence.time < time; });
  const int warp = thread / 32, writer = cell.writer / 32;
  const bool fenced =
      fence != fences.end() &&
      (cell.writer == thread || (writer == warp ? fence->epoch < epochs_[warp] : fence->time <= clocks_[warp][writer]));
  if (!fenced)
    fail("%s byte %zu of shared memory by the asynchronous proxy, which thread %d wrote without fence_async_shared",
         verb(access), index * 2, cell.writer);
}

void SharedMemory::fence_proxy(int thread) {
  fences_[thread].push_back({time(thread / 32), epochs_[thread / 32]});
  tick(thread / 32);
}

void SharedMemory::begin_async_read(int thread, int warps, const void* piece) {
  check_range(piece, 16, Access::read);
  for (size_t i = first_cell(piece); i < end_cell(piece, 16); ++i) {
    check_state(cells_[i], i, Access::read);
    for (int warp = 0; warp < warps; ++warp) {
      check_last_write(thread + 32 * warp, cells_[i], i, Access::read);
      check_proxy(thread + 32 * warp, cells_[i], i, Access::read);
    }
  }
  ++async_reads_[offset(piece) / 16];
}

void SharedMemory::end_async_read(int thread, int warps, const void* piece) {
  for (size_t i = first_cell(piece); i < end_cell(piece, 16); ++i)
    for (int warp = thread / 32; warp < thread / 32 + warps; ++warp)
      readers_[i * warps_ + warp] = {time(warp), epochs_[warp], warps > 1 ? kSeveral : static_cast<int16_t>(thread)};
  --async_reads_[offset(piece) / 16];
}

void SharedMemory::begin_copy(int thread, const void* address, size_t bytes, const char* wait, Proxy proxy) {
  check_range(address, bytes, Access::write);
  if (proxy == Proxy::async)
    for (size_t i = first_cell(address); i < end_cell(address, bytes); ++i)
      check_proxy(thread, cells_[i], i, Access::write);
  write(thread, address, bytes);
  size_t name = 0;
  while (name < waits_.size() && waits_[name] != wait) ++name;
  if (name == waits_.size()) waits_.push_back(wait);
  for (size_t i = first_cell(address); i < end_cell(address, bytes); ++i) {
    cells_[i].state = State::copying;
    cells_[i].wait = static_cast<uint8_t>(name);
  }
}

void SharedMemory::end_copy(int thread, const void* address, size_t bytes, uint32_t time, Proxy proxy) {
  for (size_t i = first_cell(address); i < end_cell(address, bytes); ++i) {
    cells_[i].state = State::plain;
    cells_[i].writer = static_cast<int16_t>(thread);
    cells_[i].write_time = time;
    cells_[i].write_epoch = epochs_[thread / 32];
    cells_[i].generic = proxy == Proxy::generic;
  }
}

void SharedMemory::claim_barrier(int thread, const void* address) {
  write(thread, address, 8);
  for (size_t i = first_cell(address); i < end_cell(address, 8); ++i) cells_[i].state = State::barrier;
}

void SharedMemory::release_barrier(const void* address) {
  for (size_t i = first_cell(address); i < end_cell(address, 8); ++i) cells_[i].state = State::plain;
}

void SharedMemory::check_barrier(int thread, const void* address) {
  const size_t i = first_cell(address);
  check_last_write(thread, cells_[i], i, Access::read);
}

}  // namespace locas::simt
