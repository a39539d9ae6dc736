// The OpenMP threads that the core shares with torch.
#pragma once

namespace oats {

// Ends the threads that OpenMP keeps between the parallel regions of the calling thread; the next region
// starts new ones. Call this before a fork: the child has none of those threads, but its first region would
// wait for them forever. Inside a region it does nothing.
void release_threads();

}  // namespace oats
