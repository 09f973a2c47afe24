// Kernels of modules/quant_utils.py for CPUs.
#include <cstdint>
