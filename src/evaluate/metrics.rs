//! How an answer is scored: the per-sample rules of LMMs-Eval's tasks, the harness of the VLMQ paper (section 5.1).
//!
//! Every prediction is stripped first, as that harness does with all model output. A score is between 0 and 1; a data
//! set's score is the mean over its samples. Rules that look odd are the harness's own and are kept: a figure is only
//! worth something where it compares with other people's.

pub use crate::data::metric::Metric;

use anyhow::{Result, ensure};

impl Metric {
    /// The right answers of a sample: its last assistant turn and those in its list.
    ///
    /// [`Vqa`](Self::Vqa) takes the list alone where there is one: it counts annotators, and the turn repeats one of
    /// them.
    pub fn right_answers<'a>(self, turn: Option<&'a str>, listed: &'a [String]) -> Vec<&'a str> {
        let turn = turn.filter(|_| self != Self::Vqa || listed.is_empty());
        turn.into_iter().chain(listed.iter().map(String::as_str)).collect()
    }

    /// Refuses lists of answers that this metric could only score with 0: an empty one, and for [`Vqa`](Self::Vqa) a
    /// single one.
    ///
    /// # Errors
    /// Says how many answers there are and how many are needed; the caller adds which sample it was.
    pub fn check_answers<S: AsRef<str>>(self, answers: &[S]) -> Result<()> {
        ensure!(!answers.is_empty(), "no right answer is given: add an assistant turn or `answers`");
        ensure!(
            self != Self::Vqa || answers.len() > 1,
            "metric `vqa` needs the answers of several annotators (TextVQA has 10), this sample has 1: \
             list them in `answers`, or use the metric `exact`"
        );
        Ok(())
    }

    /// Score of `prediction` from 0 to 1 against the right `answers`, any of which may be met (all of which count
    /// for [`Vqa`](Self::Vqa)); 0 without answers.
    pub fn score<S: AsRef<str>>(self, prediction: &str, answers: &[S]) -> f64 {
        let prediction = strip(prediction);
        let best = |score: fn(&str, &str) -> f64| {
            answers.iter().map(|answer| score(prediction, answer.as_ref())).fold(0.0, f64::max)
        };
        match self {
            Self::Exact => best(exact),
            Self::Relaxed => best(relaxed),
            Self::Anls => best(anls),
            Self::Vqa => vqa(prediction, answers),
            Self::Substring => best(substring),
            Self::Formula => best(formula),
            Self::Choice => best(choice),
            Self::FirstLetter => best(first_letter),
        }
    }
}

/// What Python calls white space: Unicode's, and four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `text` without the white space around it, as Python's `strip` sees it.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// The zero of every script with decimal digits; its nine followers are the digits 1 to 9 (Unicode category Nd).
const ZEROS: &str = "0٠۰߀०০੦૦୦௦౦೦൦෦๐໐༠၀႐០᠐᥆᧐᪀᪐᭐᮰᱀᱐꘠꣐꤀꧐꧰꩐꯰０𐒠𐴰𑁦𑃰𑄶𑇐𑋰𑑐𑓐𑙐𑛀𑜰𑣠𑥐𑱐𑵐𑶠𖩠𖫀𖭐𝟎𝟘𝟢𝟬𝟶𞅀𞋰𞥐🯰";

fn decimal_digit(c: char) -> Option<char> {
    let zero = ZEROS.chars().find(|&zero| (zero..).take(10).any(|digit| digit == c))?;
    char::from_digit(c as u32 - zero as u32, 10)
}

/// Reads a number as Python's `float` does: spaces around it, digits of any script, underscores between digits.
fn number(text: &str) -> Option<f64> {
    let mut ascii = String::new();
    let text: Vec<char> = strip(text).chars().map(|c| decimal_digit(c).unwrap_or(c)).collect();
    for (position, &c) in text.iter().enumerate() {
        if c == '_' {
            let digit = |neighbour: Option<&char>| neighbour.is_some_and(char::is_ascii_digit);
            let before = position.checked_sub(1).and_then(|before| text.get(before));
            if !digit(before) || !digit(text.get(position + 1)) {
                return None;
            }
        } else {
            ascii.push(c);
        }
    }
    ascii.parse().ok()
}

fn exact(prediction: &str, answer: &str) -> f64 {
    let answer = strip(answer).to_lowercase();
    let mut start = prediction.chars();
    let option = match (start.next(), start.next()) {
        (Some(letter), Some('.')) if letter.is_uppercase() => letter.to_lowercase().eq(answer.chars()),
        _ => false,
    };
    f64::from(option || prediction.to_lowercase() == answer)
}

fn relaxed(prediction: &str, answer: &str) -> f64 {
    let value = |text: &str| {
        if text.ends_with('%') { number(text.trim_end_matches('%')).map(|value| value / 100.0) } else { number(text) }
    };
    f64::from(match (value(prediction), value(answer)) {
        (Some(prediction), Some(answer)) if answer != 0.0 => (prediction - answer).abs() / answer.abs() <= 0.05,
        _ => prediction.to_lowercase() == answer.to_lowercase(),
    })
}

fn anls(prediction: &str, answer: &str) -> f64 {
    let plain = |text: &str| -> Vec<char> {
        words(&strip(text).to_lowercase()).collect::<Vec<_>>().join(" ").chars().collect()
    };
    let distance = levenshtein(&plain(answer), &plain(prediction));
    // The raw texts' lengths, in capitals: a letter may become two.
    let length = |text: &str| text.to_uppercase().chars().count();
    let longest = length(answer).max(length(prediction));
    let score = if longest == 0 { 1.0 } else { 1.0 - distance as f64 / longest as f64 };
    if score < 0.5 { 0.0 } else { score }
}

fn levenshtein(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, left) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, right) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(left != right);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

fn substring(prediction: &str, answer: &str) -> f64 {
    let fold = |c| match c {
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(c as u32 - 0xfee0).unwrap_or(c),
        '\u{3000}' => ' ',
        _ => c,
    };
    let plain = |text: &str| strip(&text.chars().map(fold).collect::<String>().to_lowercase()).replace('\n', " ");
    f64::from(plain(prediction).contains(&plain(answer)))
}

fn formula(prediction: &str, answer: &str) -> f64 {
    let plain = |text: &str| strip(text).replace(['\n', ' '], "");
    f64::from(plain(prediction).contains(&plain(answer)))
}

fn first_letter(prediction: &str, answer: &str) -> f64 {
    let first: String = prediction.chars().take(1).collect();
    f64::from(first.to_lowercase() == strip(&answer.to_lowercase()))
}

/// Openings that are taken out of a multiple-choice answer, one after the other.
const CHOICE_OPENINGS: [&str; 8] = [
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
];

fn choice(prediction: &str, answer: &str) -> f64 {
    let bare = CHOICE_OPENINGS.iter().fold(prediction.to_owned(), |text, opening| text.replace(opening, ""));
    let letter = bare.chars().find(|c| ('A'..='E').contains(c)).or_else(|| {
        // Without a capital: a piece of `(a)` … `(e)`, the empty text included, means that option.
        let bare = bare.to_lowercase();
        ('A'..='E').find(|letter| format!("({})", letter.to_ascii_lowercase()).contains(&bare))
    });
    let letter = letter.map(|letter| letter.to_ascii_lowercase().to_string()).unwrap_or_default();
    f64::from(letter.contains(&answer.to_lowercase()))
}

fn vqa<S: AsRef<str>>(prediction: &str, answers: &[S]) -> f64 {
    let prediction = vqa_normalize(prediction);
    let matching: Vec<bool> = answers.iter().map(|answer| vqa_normalize(answer.as_ref()) == prediction).collect();
    let matches = matching.iter().filter(|&&matches| matches).count();
    let agreement = |&own: &bool| ((matches - usize::from(own)) as f64 / 3.0).min(1.0);
    if answers.is_empty() { 0.0 } else { matching.iter().map(agreement).sum::<f64>() / answers.len() as f64 }
}

/// Signs that the VQA normalisation takes out. Commas and question marks are gone before it comes to them.
const VQA_SIGNS: &str = ";/[]\"{}()=+\\_-><@`!";

/// Right spellings; the same word short of one of its apostrophes is put right.
const VQA_CONTRACTIONS: &str = "\
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't \
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't \
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll \
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd \
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're \
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've \
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've";

/// An answer as the VQA challenge's evaluation server compares it.
fn vqa_normalize(text: &str) -> String {
    let text = text.to_lowercase().replace([',', '?'], "").replace("'s", " 's");
    let text = strip(&text).replace(['\n', '\t'], " ");
    let text = strip(&text);

    let mut plain = text.to_owned();
    for sign in VQA_SIGNS.chars() {
        let beside_space = text.contains(&format!("{sign} ")) || text.contains(&format!(" {sign}"));
        plain = plain.replace(sign, if beside_space { "" } else { " " });
    }
    let plain = without_periods(&plain);

    let spoken = words(&plain).map(number_word).filter(|word| !matches!(*word, "a" | "an" | "the"));
    spoken.map(contraction).collect::<Vec<_>>().join(" ")
}

/// Takes out periods that no digit follows; the first 32 of them, a slip in the server's code that every published
/// figure contains.
fn without_periods(text: &str) -> String {
    let mut removed = 0;
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let before_digit = rest.peek().is_some_and(|&next| decimal_digit(next).is_some());
        if c == '.' && !before_digit && removed < 32 {
            removed += 1;
        } else {
            kept.push(c);
        }
    }
    kept
}

fn number_word(word: &str) -> &str {
    const NUMBERS: [&str; 11] = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"];
    const DIGITS: [&str; 11] = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"];
    let word = if word == "none" { "zero" } else { word };
    NUMBERS.iter().position(|number| *number == word).map_or(word, |position| DIGITS[position])
}

fn contraction(word: &str) -> &str {
    // The one entry of the server's list that goes the other way.
    if word == "somebody'd" {
        return "somebodyd";
    }
    let lacks_one = |full: &str| {
        full.match_indices('\'').any(|(position, _)| {
            let (head, tail) = (&full[..position], &full[position + 1..]);
            word.strip_prefix(head) == Some(tail)
        })
    };
    VQA_CONTRACTIONS.split_ascii_whitespace().find(|full| lacks_one(full)).unwrap_or(word)
}
