// Whether the CUDA kernels run on the current GPU at all.
#pragma once

// Null, or why not: the driver is too old for the CUDA that they were built with, or they hold no
// code for this GPU. The text stays until the next call of the thread. `lasts` becomes 0 where
// another call may answer otherwise: no memory for a context. Python asks by this name, so that
// there is an answer wherever an op is called: while a graph is recorded or traced.
extern "C" __attribute__((visibility("default"))) const char* transformer_ext_cuda_problem(
    int* lasts);
