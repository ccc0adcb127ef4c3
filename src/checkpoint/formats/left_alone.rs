//! How a file names the linear layers that are not quantized.

use super::specs::LinearSpec;

/// Regular expressions, matched from the start of a module's name, for all linear layers that are not quantized.
///
/// Loaders rename modules (`visual.…` becomes `model.visual.…`), so each is matched by the part of its name that tells it
/// from the quantized ones: a whole branch when no quantized layer is in a branch of that name, else its full path below
/// what all quantized layers share. `lm_head` is always in: a tied one has no tensor, yet is a linear layer to loaders.
pub(super) fn left_alone(quantized: &[LinearSpec], others: &[String]) -> Vec<String> {
    let paths: Vec<Vec<&str>> = quantized.iter().map(|linear| linear.module.split('.').collect()).collect();
    // A block's number stays with the word before it.
    let numbered = |path: &[&str]| path.iter().position(|part| part.parse::<usize>().is_ok()).unwrap_or(path.len());
    let shared = paths.first().map_or(0, |first| {
        let block = numbered(first).saturating_sub(1);
        (0..block).take_while(|&i| paths.iter().all(|path| path.get(i) == Some(&first[i]))).count()
    });
    let mut patterns = vec![r"(.*\.)?lm_head$".to_owned()];
    for other in others {
        let path: Vec<&str> = other.split('.').collect();
        let branch = path.iter().find(|part| !paths.iter().any(|path| path.contains(part)));
        let pattern = match branch {
            // Embeddings are not linear layers; naming them would only lengthen the list.
            Some(part) if part.starts_with("embed_") => continue,
            Some(part) if Some(part) == path.last() => format!(r"(.*\.)?{}$", escape(part)),
            Some(part) => format!(r"(.*\.)?{}\..*", escape(part)),
            None => {
                let common = path.iter().zip(&paths[0][..shared]).take_while(|(a, b)| a == b).count();
                format!(r"(.*\.)?{}$", escape(&path[common..].join(".")))
            }
        };
        if !patterns.contains(&pattern) {
            patterns.push(pattern);
        }
    }
    patterns
}

/// Escapes what regular expressions would take as syntax in a module's name.
fn escape(name: &str) -> String {
    name.replace('.', r"\.")
}
