// Included before the sources that a test puts faults into, all in one library: which of them is on is said at run
// time.
#pragma once

extern "C" __attribute__((visibility("default"))) int emulated_fault_is(const char* name);
#define FAULT(NAME, RIGHT, WRONG) (emulated_fault_is(#NAME) ? (WRONG) : (RIGHT))
