// Runs the kernels of a .cu file on the CPU, for tests. Never shipped.
//
// The file is compiled as C++ with csrc/testing/cuda_emulation/ in place of CUDA's headers. Blocks
// run one after the other; the threads of a block are fibers, each of which runs until it waits for
// others (__syncthreads, __syncwarp, shuffles, votes). What a GPU leaves undefined is an error
// here: a collective that not all its lanes reach, or in different places, a shuffle from a lane
// outside of the mask, more shared memory than there is. Shared memory starts as NaN and lies on
// the heap, where AddressSanitizer sees its bounds. The error comes out of cudaGetLastError(), as
// from a GPU.
//
// set_schedule() changes the order of the blocks and the threads: results that are not the same for
// all schedules bit for bit tell of a race. ThreadSanitizer (preset tsan) takes each thread for a
// thread of its own, and finds races whatever the schedule.
//
// It cannot show speed, nor what depends on the order in which a GPU makes memory visible.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace cuda_emulation {

using Location = std::source_location;

struct Index {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
};

// 0: ascending, 1: descending, above: shuffled by this seed.
void set_schedule(unsigned schedule);

// Runs `thread` for every thread of every block. Errors: see last_error().
void launch(const void* kernel, const std::function<void()>& thread, Index blocks, Index threads,
            size_t shared_bytes);

// Launches are on this device, 0 at first. Devices differ in what kernels are allowed, no more.
void set_device(int device);
int device();
// How much dynamic shared memory the kernel may ask for on this device (48 KiB if not set); false
// if that is more than there is.
bool allow_shared(const void* kernel, size_t bytes);
// How often that was asked.
int allowed_times();
// How much they may be allowed: that of an H200 if not set.
void set_most_shared(size_t bytes);
size_t most_shared();

// nullptr where all went well since the last call.
const char* last_error();
// The next launch fails with this error of CUDA's (a cudaError_t) instead of running, or the next
// question for a kernel's attributes, which takes it.
void fail_next(int error);
int take_failure();
// That of the last launch, once.
int failed_launch();

// ---- Within a kernel ----------------------------------------------------------------------------

// Memory of the block: the same for the same key. All bits set at first: NaN.
void* shared(const void* key, size_t bytes);
void* dynamic_shared();

void sync_threads(Location where);

// Returns when all lanes of `mask` have called it with the same `what`; the last of them runs `all`
// with the `mine` of each (by lane; null outside of the mask). `what` is a literal.
using Together = void (*)(void* const* lanes, unsigned mask);
void warp_together(unsigned mask, const char* what, void* mine, Together all, Location where);

// Copies of this thread that go on by themselves (cp.async), in groups. next_copy() gives one that
// must be done when all groups but the last `pending` are waited for, if there is one left. What a
// thread has not waited for when it returns is an error.
struct AsyncCopy {
  void* to;
  const void* from;
};
void note_copy(AsyncCopy copy);
void end_copy_group();
bool next_copy(unsigned pending, AsyncCopy& copy);

// Ends the launch with this error.
[[noreturn]] void fail(const char* text);

Index thread_index();
Index block_index();
Index block_size();
Index grid_size();

}  // namespace cuda_emulation
