// locas_simt_tests [word]: runs the tests whose name contains the word, all without one; a line for each.
#include <chrono>
#include <cstdarg>
#include <cstdlib>
#include <cstring>

#include "harness.h"

namespace locas::test {

std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

void fail(const char* format, ...) {
  std::fflush(stdout);
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
  int ran = 0;
  for (const Test& test : tests()) {
    if (count > 1 && !std::strstr(test.name, arguments[1])) continue;
    const auto start = std::chrono::steady_clock::now();
    const std::string what = test.run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s: %s: ok (%.2f s)\n", test.name, what.c_str(), seconds.count());
    std::fflush(stdout);
    ++ran;
  }
  if (ran == 0) fail("no test's name contains '%s'", count > 1 ? arguments[1] : "");
  return 0;
}
