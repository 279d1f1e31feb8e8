// The kernels around the rounds of a loop, on the host; a GPU's graph asks them as this loop does.
#include "kernels/cuda/step_loop.h"

#include <catch2/catch.hpp>

#include "tests/simt/simt_backend.h"

using namespace ddpm;

namespace {

class Loop {
 public:
  void begin(int64_t times) { run<cuda::begin_loop_kernel>(counter(), times); }
  bool enter() {
    run<cuda::enter_loop_kernel>(condition(), counter(), control());
    return again_ == 1;
  }
  bool end_round() {
    run<cuda::end_round_kernel>(condition(), counter(), control());
    return again_ == 1;
  }
  void count_round() { run<cuda::count_round_kernel>(counter(), control()); }
  // As a WHILE node does; `stop` rounds in, the host says stop (-1: never). The rounds that ran.
  int while_node(int stop) {
    int rounds = 0;
    for (bool again = enter(); again; again = end_round()) {
      if (++rounds == stop) control()[cuda::kControlStop] = 1;
    }
    return rounds;
  }
  int64_t* control() { return static_cast<int64_t*>(control_->data()); }

 private:
  template <auto Kernel, typename... Args>
  static void run(Args... args) {
    cuda::launch<Kernel>({.block = 32}, nullptr, args...);
  }
  int64_t* counter() { return static_cast<int64_t*>(counter_->data()); }
  cuda::GraphCondition condition() { return reinterpret_cast<cuda::GraphCondition>(&again_); }

  std::unique_ptr<Backend> backend_ = test::make_simt_backend(DType::kF32);
  std::unique_ptr<Memory> counter_ = backend_->allocate(2 * sizeof(int64_t));
  std::unique_ptr<Memory> control_ = backend_->allocate(2 * sizeof(int64_t));
  uint32_t again_ = 7;
};

}  // namespace

TEST_CASE("simt.step_loop: as many rounds as were asked for, counted over all loops",
          "[step_loop]") {
  Loop loop;
  int64_t all = 0;
  for (const int times : {3, 0, 1, 50}) {
    loop.begin(times);
    CHECK(loop.while_node(-1) == times);
    all += times;
    CHECK(loop.control()[cuda::kControlRuns] == all);
  }
}

TEST_CASE("simt.step_loop: the host's stop ends the loop after its round, and one not begun",
          "[step_loop]") {
  Loop loop;
  loop.begin(50);
  CHECK(loop.while_node(7) == 7);
  CHECK(loop.control()[cuda::kControlRuns] == 7);
  loop.begin(50);
  CHECK(loop.while_node(-1) == 0);
  loop.control()[cuda::kControlStop] = 0;
  loop.begin(2);
  CHECK(loop.while_node(-1) == 2);
  CHECK(loop.control()[cuda::kControlRuns] == 9);
}

TEST_CASE("simt.step_loop: rounds that are launched one by one are counted alike", "[step_loop]") {
  Loop loop;
  loop.begin(4);
  for (int i = 0; i < 4; ++i) {
    CHECK(loop.control()[cuda::kControlRuns] == i);
    loop.count_round();
  }
  CHECK(loop.control()[cuda::kControlRuns] == 4);
  CHECK_FALSE(loop.enter());  // none is left
}
