//! Pictures for [vlmq](https://docs.rs/vlmq): image files to RGB as Pillow reads them, scaled as torchvision scales them, and back to files.
//!
//! A crate of its own for the compiler's sake: the decoders and the scaling are generic, some 600,000 lines of intermediate code that
//! every change of vlmq would compile anew.

mod container;
mod jpeg;
mod orientation;
mod read;
mod resize;
mod write;

pub use image::{Rgb, RgbImage, imageops};
pub use read::{MAX_PIXELS, read};
pub use resize::resize;
pub use write::{write_jpeg, write_png};
