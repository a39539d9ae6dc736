#include "oats/threads.h"

#include <omp.h>

namespace oats {

void release_threads() {
  omp_pause_resource_all(omp_pause_soft);
}

}  // namespace oats
