// A fiber: a function on a stack of its own, entered and left at will. Stacks have a guard page.
#pragma once

#include <boost/context/detail/fcontext.hpp>
#include <cstddef>
#include <functional>

namespace ddpm::simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(Fiber&& other) noexcept;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() begins `body` anew; whatever ran before is dropped without unwinding. `body`
  // must not let an exception out.
  void start(const std::function<void()>* body);
  // Runs until the fiber leaves or its body ends.
  void resume();
  // From inside: back to whoever resumed.
  void leave();
  bool done() const { return done_; }

 private:
  static void enter(boost::context::detail::transfer_t from);

  void* stack_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  boost::context::detail::fcontext_t inside_ = nullptr, outside_ = nullptr;
  bool done_ = true;
  // AddressSanitizer's view of the two stacks.
  void* fake_inside_ = nullptr;
  void* fake_outside_ = nullptr;
  const void* outside_bottom_ = nullptr;
  size_t outside_size_ = 0;
};

}  // namespace ddpm::simt
