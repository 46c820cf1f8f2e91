// Kernels that abort, each in a process of its own: what the runner's own tests plant bugs with.
#pragma once

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "simt/tests/harness.h"

namespace locas::test {

// What the runner or fail() said before the process ended; empty if it ended well.
inline std::string last_words(const std::function<void()>& body) {
  int ends[2];
  if (pipe(ends) != 0) fail("pipe");
  std::fflush(stdout);
  const pid_t child = fork();
  if (child < 0) fail("fork");
  if (child == 0) {
    const rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    dup2(ends[1], STDERR_FILENO);
    body();
    _exit(0);
  }
  close(ends[1]);
  std::string words;
  char part[512];
  for (ssize_t count; (count = read(ends[0], part, sizeof part)) > 0;) words.append(part, count);
  close(ends[0]);
  int status;
  waitpid(child, &status, 0);
  const bool well = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  if (!well && words.empty()) fail("a process ended with status %d and without a word", status);
  return well ? "" : words;
}

// Aborts unless at least one of the seeds finds the bug, saying `reason` ("": anything); returns how many did.
inline int seeds_that_find(const char* bug, const char* reason, const std::function<void()>& body) {
  int found = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    const std::string words = last_words([&] {
      simt::set_seed(seed);
      body();
    });
    if (words.empty()) continue;
    if (words.find(reason) == std::string::npos)
      fail("%s, seed %d: expected '%s' but got: %s", bug, seed, reason, words.c_str());
    ++found;
  }
  if (found == 0) fail("%s: no seed of %d found it", bug, kSeeds);
  return found;
}

}  // namespace locas::test
