//! A stand-in for the CUDA driver, cuBLAS and cuRAND, for tests without a GPU. Device memory is ordinary memory that is
//! watched byte by byte, kernels are executed from the PTX that is in the program, and streams are as lazy as they may be.
//! The README says what this proves, what it does not, and how to use it.

pub mod access;
pub mod alu;
pub mod convert;
pub mod cublas;
pub mod curand;
pub mod decode;
pub mod device;
pub mod driver;
pub mod memory;
pub mod number;
pub mod ptx;
pub mod registers;
pub mod report;
pub mod settings;
pub mod shared;
pub mod tensor_core;
pub mod vm;
