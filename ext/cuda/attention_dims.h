// The sizes of heads that the attention kernels are built for: one(16) one(32) ... Multiples of 16; each one costs a
// dozen kernels. A program of tests may ask for fewer. Python's list: exl_runtime/ops/attention/choose.py.
#pragma once

#ifndef EXL_ATTENTION_DIMS
#define EXL_ATTENTION_DIMS(one) one(16) one(32) one(64) one(80) one(96) one(128) one(256)
#endif
