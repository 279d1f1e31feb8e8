#include "tests/simt/fiber.h"

#include <sys/mman.h>

#include <utility>

#include "kernels/error.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace ddpm::simt {
namespace {

using boost::context::detail::fcontext_t;
using boost::context::detail::jump_fcontext;
using boost::context::detail::make_fcontext;
using boost::context::detail::transfer_t;

constexpr size_t kPage = 4096, kStack = 128 * 1024;

// Boost.Context in Debian knows nothing of AddressSanitizer, so it is told here.
void start_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom,
                  [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, size);
#endif
}
void finish_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** bottom,
                   [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, bottom, size);
#endif
}

}  // namespace

Fiber::Fiber() {
  stack_ = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack_ == MAP_FAILED) fail(Status::kMemory, "mmap of a fiber's stack");
  mprotect(stack_, kPage, PROT_NONE);
}

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kStack + kPage);
}

Fiber::Fiber(Fiber&& other) noexcept : stack_(std::exchange(other.stack_, nullptr)) {}

void Fiber::start(const std::function<void()>* body) {
  char* bottom = static_cast<char*>(stack_) + kPage;
#if defined(__SANITIZE_ADDRESS__)
  // A body that was dropped has left its frames' poison behind.
  if (!done_) __asan_unpoison_memory_region(bottom, kStack);
#endif
  body_ = body;
  inside_ = make_fcontext(bottom + kStack, kStack, enter);
  fake_inside_ = nullptr;
  done_ = false;
}

void Fiber::resume() {
  start_switch(&fake_outside_, static_cast<char*>(stack_) + kPage, kStack);
  const transfer_t back = jump_fcontext(inside_, this);
  finish_switch(fake_outside_, nullptr, nullptr);
  inside_ = back.fctx;
}

void Fiber::leave() {
  start_switch(&fake_inside_, outside_bottom_, outside_size_);
  const transfer_t back = jump_fcontext(outside_, nullptr);
  finish_switch(fake_inside_, &outside_bottom_, &outside_size_);
  outside_ = back.fctx;
}

void Fiber::enter(transfer_t from) {
  Fiber& self = *static_cast<Fiber*>(from.data);
  finish_switch(nullptr, &self.outside_bottom_, &self.outside_size_);
  self.outside_ = from.fctx;
  (*self.body_)();
  self.done_ = true;
  start_switch(nullptr, self.outside_bottom_, self.outside_size_);
  jump_fcontext(self.outside_, nullptr);
}

}  // namespace ddpm::simt
