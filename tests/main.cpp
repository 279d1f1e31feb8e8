// The one translation unit that compiles Catch2's main. --simt-coverage: runs the tests of the CUDA
// kernels, then says which kernels ran on the host; fails if one did not. --device cuda: the tests
// of the kernels (simt.*) run them on a GPU. --conv-tables: prints what docs/kernels.md holds.
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#include <iostream>

#include "tests/conv_table.h"
#include "tests/kernel_backend.h"
#include "tests/simt/machine.h"

namespace {

bool print_coverage() {
  size_t ran = 0;
  const auto& kernels = ddpm::simt::kernels();
  for (const auto& [name, has_run] : kernels) {
    ran += has_run;
    if (!has_run) std::cout << "did not run: " << name << "\n";
  }
  std::cout << ran << " of " << kernels.size() << " kernels ran on the host\n";
  return ran == kernels.size() && ran > 0;
}

}  // namespace

int main(int argc, char* argv[]) {
  Catch::Session session;
  bool coverage = false;
  bool tables = false;
  std::string device = "host";
  session.cli(session.cli() |
              Catch::clara::Opt(coverage)["--simt-coverage"](
                  "run the simt tests and list the kernels that did not run") |
              Catch::clara::Opt(tables)["--conv-tables"](
                  "print the tables of convolutions of docs/kernels.md") |
              Catch::clara::Opt(device, "host|cuda")["--device"]("what runs the CUDA kernels"));
  if (const int bad = session.applyCommandLine(argc, argv)) return bad;
  if (tables) {
    std::cout << ddpm::test::conv_tables();
    return 0;
  }
  if (device == "cuda") {
    ddpm::test::kernel_device() = ddpm::test::KernelDevice::kGpu;
  } else if (device != "host") {
    std::cerr << "--device " << device << ": allowed are host, cuda\n";
    return 2;
  }
  if (coverage) session.configData().testsOrTags = {"simt.*"};
  const int failed = session.run();
  if (!coverage) return failed;
  return print_coverage() && failed == 0 ? 0 : 1;
}
