//! Images: reading them as Pillow does, and the patches a vision tower takes.

use super::patches::PatchSettings;
use super::paths::real_path_inside;
use super::source::ImageSource;
use super::tiles::Tiles;
use crate::input;
use crate::tensor::Matrix;
use anyhow::{Context, Result};
use std::borrow::Cow;
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use vlmq_picture::RgbImage;

pub use vlmq_picture::MAX_PIXELS;

/// Most bytes an image file may have.
pub const MAX_FILE_BYTES: u64 = 256 << 20;

/// An image as a vision tower takes it: one crop or several, from which patches can be cut.
///
/// Patches are float32, and the Qwen towers' hold every pixel twice (once for each frame of a video): up to 8 times the
/// bytes of the pixels. A calibration set stays in memory, hence it is kept as pixels and cut when a vision tower asks.
#[derive(Clone, Debug)]
pub struct ImagePatches {
    /// `(height, width)` in pixels of the image as it was read.
    pub original: (usize, usize),
    /// Patches of a crop from top to bottom, before merging; all crops are alike.
    pub grid_height: usize,
    /// Patches of a crop from left to right, before merging.
    pub grid_width: usize,
    /// The tiles that stand, row by row, behind a first crop of the whole image; `None` where that is the only one.
    pub tiles: Option<Tiles>,
    crops: Vec<RgbImage>,
    settings: Arc<PatchSettings>,
}

impl ImagePatches {
    /// One crop: all of `image`, resized.
    pub(super) fn whole(image: &RgbImage, resized: RgbImage, settings: Arc<PatchSettings>) -> Self {
        Self {
            original: (image.height() as usize, image.width() as usize),
            grid_height: resized.height() as usize / settings.patch_size,
            grid_width: resized.width() as usize / settings.patch_size,
            tiles: None,
            crops: vec![resized],
            settings,
        }
    }

    /// Patches of all of `image`, then of `tiles` of it, row by row: `crops`, all of one size.
    pub(super) fn tiled(image: &RgbImage, crops: Vec<RgbImage>, tiles: Tiles, settings: Arc<PatchSettings>) -> Self {
        debug_assert_eq!(crops.len(), 1 + tiles.rows * tiles.columns);
        let mut crops = crops.into_iter();
        let whole = Self::whole(image, crops.next().expect("the whole image comes first"), settings);
        Self { tiles: Some(tiles), crops: whole.crops.into_iter().chain(crops).collect(), ..whole }
    }

    /// The normalised patches of all crops, one after another. See [`crop_patches`](Self::crop_patches).
    pub fn patches(&self) -> Matrix {
        stacked_patches((0..self.crops.len()).map(|crop| (self, crop)))
    }

    /// The normalised patches of one crop: `[grid_height * grid_width, 3 * temporal_patch_size * patch_size²]`.
    ///
    /// Rows go through the merged grid row by row, and inside each merged square row by row. A row holds channels, frames,
    /// then the patch's pixels row by row.
    pub fn crop_patches(&self, crop: usize) -> Matrix {
        stacked_patches([(self, crop)].into_iter())
    }

    /// The crops' pixels.
    pub fn crops(&self) -> &[RgbImage] {
        &self.crops
    }

    /// Width and height in pixels of the part of a crop that fills patches.
    pub fn crop_size(&self) -> [u32; 2] {
        [self.grid_width, self.grid_height].map(|patches| (patches * self.settings.patch_size) as u32)
    }

    /// `(height, width)` of a crop's grid in merged squares, of which each becomes one vector.
    pub fn merged_grid(&self) -> (usize, usize) {
        (self.grid_height / self.settings.merge_size, self.grid_width / self.settings.merge_size)
    }
}

/// The normalised patches of some images' crops, one after another, all of one family. See
/// [`crop_patches`](ImagePatches::crop_patches).
pub fn stacked_patches<'a>(crops: impl Iterator<Item = (&'a ImagePatches, usize)> + Clone) -> Matrix {
    let (rows, cols) = stacked_shape(crops.clone());
    // They are many: an array that grew would be there twice.
    let mut values = Vec::with_capacity(rows * cols);
    crops.for_each(|(image, crop)| image.settings.patchify(&image.crops[crop], &mut values));
    Matrix::new(rows, cols, values).expect("every patch of a crop, and of one size")
}

/// Rows and columns of [`stacked_patches`].
pub fn stacked_shape<'a>(crops: impl Iterator<Item = (&'a ImagePatches, usize)> + Clone) -> (usize, usize) {
    let rows = crops.clone().map(|(image, _)| image.grid_height * image.grid_width).sum();
    let cols = crops.clone().next().map_or(0, |(image, _)| image.settings.patch_values());
    (rows, cols)
}

/// Context of an error of one image: that what is wrong is the image, and which it is.
#[derive(Debug)]
pub struct BadImage(pub(super) String);

impl fmt::Display for BadImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Reads an image to RGB, upright.
///
/// Which kinds of files, and what becomes of their pixels, is said at [`vlmq_picture::read`].
///
/// Errors, naming the file and `origin` (where the image is asked for) in a [`BadImage`], when the file is missing, broken, of another
/// kind, a link out of its folder, or above [`MAX_FILE_BYTES`] or [`MAX_PIXELS`]; the latter is found before any pixel is decoded.
pub fn decode(source: &ImageSource, origin: &str) -> Result<RgbImage> {
    let (name, bytes) = match source {
        ImageSource::File(path) => (format!("image {}", path.display()), read_file(path, None).map(Cow::Owned)),
        ImageSource::Below { root, path } => {
            (format!("image {}", path.display()), read_file(path, Some(root)).map(Cow::Owned))
        }
        ImageSource::Bytes(bytes) => ("an image in a data: URI".to_string(), Ok(Cow::Borrowed(bytes.as_slice()))),
    };
    bytes.and_then(|bytes| vlmq_picture::read(&bytes)).with_context(|| BadImage(format!("{origin}: {name}")))
}

fn read_file(path: &Path, root: Option<&Path>) -> Result<Vec<u8>> {
    fs::metadata(path).context("cannot be read; relative paths count from the data file or --image-root")?;
    match root {
        None => input::read(path, MAX_FILE_BYTES),
        Some(root) => input::read(&real_path_inside(path, root)?, MAX_FILE_BYTES),
    }
}
