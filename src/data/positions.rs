//! Positions of tokens for multimodal rotary embedding (M-RoPE, arXiv 2409.12191, section 2.1).

use anyhow::{Result, bail, ensure};

/// Temporal, vertical and horizontal position of every token.
///
/// A text token has one position on all three axes. An image's tokens share the temporal position at which the image
/// begins and count rows and columns of its grid from there; what follows begins after the larger side of the grid.
/// `merged_grids` holds `(height, width)` of each image in tokens, that is after the vision tower's merging, in the
/// order in which the images stand in the sequence.
///
/// Errors when the image tokens and the grids disagree.
pub fn mrope_positions(tokens: &[u32], image_token_id: u32, merged_grids: &[(usize, usize)]) -> Result<Vec<[u32; 3]>> {
    let mut positions = Vec::with_capacity(tokens.len());
    let mut grids = merged_grids.iter().enumerate();
    let mut next = 0u32;
    let mut at = 0;
    while at < tokens.len() {
        if tokens[at] != image_token_id {
            positions.push([next; 3]);
            next += 1;
            at += 1;
            continue;
        }
        let Some((image, &(height, width))) = grids.next() else {
            bail!("image token at position {at} belongs to none of the {} images", merged_grids.len());
        };
        let count = height * width;
        let found = tokens[at..].iter().take(count).take_while(|&&token| token == image_token_id).count();
        ensure!(count > 0 && found == count, "image {image} has {height}x{width} tokens, the sequence {found} at {at}");
        for row in 0..height as u32 {
            positions.extend((0..width as u32).map(|column| [next, next + row, next + column]));
        }
        next += height.max(width) as u32;
        at += count;
    }
    if let Some((image, _)) = grids.next() {
        bail!("image {image} has no tokens in the sequence");
    }
    Ok(positions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_count_from_where_the_image_begins() {
        let tokens = [1, 2, 3, 9, 9, 9, 9, 9, 9, 4, 5];
        let positions = mrope_positions(&tokens, 9, &[(2, 3)]).unwrap();
        let axis = |a: usize| positions.iter().map(|p| p[a]).collect::<Vec<_>>();
        assert_eq!(axis(0), [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7]);
        assert_eq!(axis(1), [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7]);
        assert_eq!(axis(2), [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn disagreement_is_refused() {
        for (tokens, grids) in [
            (vec![9, 9], vec![]),
            (vec![9, 9, 1], vec![(1, 3)]),
            (vec![9, 9, 9], vec![(1, 2)]),
            (vec![1], vec![(1, 1)]),
            (vec![9, 9], vec![(2, 1), (1, 1)]),
            (vec![9], vec![(0, 1)]),
        ] {
            assert!(mrope_positions(&tokens, 9, &grids).is_err(), "{tokens:?} {grids:?}");
        }
        assert_eq!(mrope_positions(&[], 9, &[]).unwrap(), Vec::<[u32; 3]>::new());
    }
}
