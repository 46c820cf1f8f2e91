// locas_simt_tests [word [seed]]: runs the tests whose name contains the word ("" for all), a line for each. The seed
// draws the shapes; without it they are new in every run.
#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdlib>
#include <cstring>

#include "simt/tests/harness.h"
#include "simt/warp.h"

namespace locas::test {

std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

namespace {
uint64_t shape_seed = 0;
}
Random& fresh() {
  static Random random(shape_seed);
  return random;
}

void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "shape seed %llu: ", static_cast<unsigned long long>(shape_seed));
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::exit(1);
}

void for_each_seed(const std::function<void()>& body) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    simt::set_seed(seed);
    body();
  }
}

}  // namespace locas::test

int main(int count, char** arguments) {
  using namespace locas::test;
  shape_seed = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : std::random_device()();
  std::printf("shape seed %llu\n", static_cast<unsigned long long>(shape_seed));
  // The runner's own tests fork, which is quick while the process is small.
  std::stable_partition(tests().begin(), tests().end(),
                        [](const Test& test) { return std::strncmp(test.name, "runner", 6) == 0; });
  int ran = 0;
  for (const Test& test : tests()) {
    if (count > 1 && !std::strstr(test.name, arguments[1])) continue;
    const auto start = std::chrono::steady_clock::now();
    const uint64_t conflicts_before = locas::simt::ldmatrix_conflicts();
    const std::string what = test.run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const uint64_t conflicts = locas::simt::ldmatrix_conflicts() - conflicts_before;
    std::printf("%s: %s: ok (%.2f s)", test.name, what.c_str(), seconds.count());
    if (conflicts > 0) std::printf(", %llu bank conflicts of ldmatrix", static_cast<unsigned long long>(conflicts));
    std::printf("\n");
    std::fflush(stdout);
    ++ran;
  }
  if (ran == 0) fail("no test's name contains '%s'", count > 1 ? arguments[1] : "");
  return 0;
}
