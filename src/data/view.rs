//! What an image's tokens show: the picture as the vision tower saw it, and a token for each cell of a grid over it.

use super::image::ImagePatches;
use vlmq_picture::RgbImage;

/// A picture under a grid of tokens. An image has one or several, one behind the other in its tokens.
#[derive(Clone, Debug)]
pub struct View {
    /// Exactly what the grid covers, as the tower saw it.
    pub picture: RgbImage,
    /// Cells from top to bottom; tokens go through them row by row.
    pub rows: usize,
    /// Cells from left to right.
    pub columns: usize,
    /// Whether each row ends with one more token, which stands for no place in the picture.
    pub row_ends: bool,
}

impl View {
    /// The first crop of an image, with one token for each merged square of patches. Pixels at the right and the bottom that
    /// fill no patch are cut off.
    pub(super) fn of_first_crop(image: &ImagePatches) -> Self {
        let (rows, columns) = image.merged_grid();
        let [width, height] = image.crop_size();
        let crop = &image.crops()[0];
        let picture = vlmq_picture::imageops::crop_imm(crop, 0, 0, width, height).to_image();
        Self { picture, rows, columns, row_ends: false }
    }

    /// Tokens from the first of one row to the first of the next.
    pub fn stride(&self) -> usize {
        self.columns + usize::from(self.row_ends)
    }

    /// All tokens.
    pub fn tokens(&self) -> usize {
        self.rows * self.stride()
    }
}
