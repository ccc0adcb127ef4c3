//! Teacher-forced answers: log-likelihood of their tokens, and divergence from and agreement with a reference model at each of
//! them.

use super::generate::argmax;
use crate::data::sequence::Sequence;
use crate::device::ModelOps;
use crate::model::language_model::{LanguageModel, Stream};
use crate::tensor::Matrix;
use anyhow::{Result, ensure};

/// Logits `[answer tokens, vocab]` that predict the answer of each of some sequences. `streams` are the sequences, embedded in their
/// order.
pub fn answer_logits<D: ModelOps>(
    device: &D,
    model: &LanguageModel<D>,
    sequences: &[Sequence],
    mut streams: Vec<Stream<D::Tensor>>,
) -> Result<Vec<Matrix>> {
    model.forward_all(device, &mut streams, None)?;
    let mut logits = Vec::with_capacity(sequences.len());
    for Stream { x, layout } in streams {
        let own = &sequences[logits.len()..][..layout.spans.len()];
        let rows: Vec<u32> = own
            .iter()
            .zip(&layout.spans)
            // The token before predicts a token; a prompt is never empty, so there is one before.
            .flat_map(|(s, span)| s.answer.clone().map(move |token| (span.q.start + token - 1) as u32))
            .collect();
        let all = model.logits(device, &x, &rows)?;
        let mut values = all.data();
        for sequence in own {
            let (first, rest) = values.split_at(sequence.answer.len() * all.cols());
            logits.push(Matrix::new(sequence.answer.len(), all.cols(), first.to_vec())?);
            values = rest;
        }
    }
    Ok(logits)
}

/// Sum of `−ln p(token)` over one row of logits a token.
pub fn negative_log_likelihood(logits: &Matrix, tokens: &[u32]) -> f64 {
    tokens
        .iter()
        .enumerate()
        .map(|(i, &token)| log_normaliser(logits.row(i)) - f64::from(logits.row(i)[token as usize]))
        .sum()
}

/// Sum over rows of `KL(reference ‖ model) = Σ p_ref · (ln p_ref − ln p)`.
pub fn divergence(reference: &Matrix, model: &Matrix) -> Result<f64> {
    ensure!(
        reference.cols() == model.cols() && reference.rows() == model.rows(),
        "the reference model has a vocabulary of {}, the model one of {}",
        reference.cols(),
        model.cols()
    );
    let row_divergence = |row: usize| -> f64 {
        let (p, q) = (reference.row(row), model.row(row));
        let (p_normaliser, q_normaliser) = (log_normaliser(p), log_normaliser(q));
        p.iter()
            .zip(q)
            .map(|(&p, &q)| {
                let log_p = f64::from(p) - p_normaliser;
                log_p.exp() * (log_p - (f64::from(q) - q_normaliser))
            })
            .sum()
    };
    Ok((0..model.rows()).map(row_divergence).sum())
}

/// Rows in which both have the same likeliest token.
pub fn agreeing(reference: &Matrix, model: &Matrix) -> usize {
    let rows = reference.rows().min(model.rows());
    (0..rows).filter(|&row| argmax(reference.row(row)) == argmax(model.row(row))).count()
}

/// `ln Σ exp(logit)`.
fn log_normaliser(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likelihood_and_divergence_of_hand_made_distributions() {
        // ln of (1/2, 1/4, 1/4) and of (1/4, 1/2, 1/4), shifted by constants that must not matter.
        let ln = f32::ln;
        let p = Matrix::new(1, 3, vec![ln(0.5) + 7.0, ln(0.25) + 7.0, ln(0.25) + 7.0]).unwrap();
        let q = Matrix::new(1, 3, vec![ln(0.25) - 3.0, ln(0.5) - 3.0, ln(0.25) - 3.0]).unwrap();
        assert!((negative_log_likelihood(&p, &[1]) - 4f64.ln()).abs() < 1e-6);
        assert!((divergence(&p, &q).unwrap() - 0.25 * 2f64.ln()).abs() < 1e-6);
        assert_eq!(divergence(&p, &p).unwrap(), 0.0);
    }

    #[test]
    fn the_likeliest_tokens_of_hand_made_rows() {
        let rows = |data: [f32; 6]| Matrix::new(2, 3, data.to_vec()).unwrap();
        let p = rows([0.0, 2.0, 1.0, 5.0, 5.0, 4.0]);
        assert_eq!(agreeing(&p, &p), 2);
        // Only the order counts; among equals, the first.
        assert_eq!(agreeing(&p, &rows([-9.0, -1.0, -2.0, 0.0, 1.0, 0.0])), 1);
        assert_eq!(agreeing(&p, &rows([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])), 1);
    }
}
