// `all NAME planted|fixed` runs one bug, `all fixed` all the corrected kernels. Exits with 3 for a wrong result.
#include <cstring>

#include "divergent_barrier.cu"
#include "global_store.cu"
#include "grid_race.cu"
#include "misaligned.cu"
#include "missing_barrier.cu"
#include "shared_store.cu"
#include "uninitialised_shared.cu"
#include "wrong_mask.cu"

int main(int argc, char** argv) {
  bool right = true;
  int ran = 0;
  for (const Bug& bug : bugs()) {
    if (argc == 3 && strcmp(argv[1], bug.name) != 0) continue;
    const bool good = strcmp(argv[argc - 1], "planted") == 0 ? bug.planted() : bug.fixed();
    if (!good) fprintf(stderr, "%s: wrong result\n", bug.name);
    right = right && good;
    ++ran;
  }
  return ran == 0 ? 2 : right ? 0 : 3;
}
