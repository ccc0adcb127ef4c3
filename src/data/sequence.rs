//! Token sequences: what a model takes of a conversation.

use super::conversation::{Conversation, Message, Part};
use super::forms::NO_VIDEO;
use super::image::{BadImage, ImagePatches, MAX_PIXELS, decode};
use super::patches::read_json;
use super::template::{ChatTemplate, MAX_BYTES, TemplateChoice};
use super::tokenizer::Tokenizer;
use super::view::View;
use crate::parallel::map;
use anyhow::{Context, Result, bail, ensure};
use std::ops::Range;
use std::path::Path;
use vlmq_picture::RgbImage;

/// Most tokens of a sample: four times the longest context of the families' models, and few enough for positions to be
/// numbered in 32 bits.
pub const MAX_TOKENS: usize = 1 << 20;

/// Most pixels that the images of one sample have once they are cut: as many as four of the largest images. They stay in
/// memory, 3 bytes each.
pub const MAX_SAMPLE_PIXELS: u64 = 4 * MAX_PIXELS;

/// What a model family does to images before its vision tower sees them.
pub trait VisionInput: Send + Sync {
    /// The token that stands for one vector of the vision tower.
    fn image_token_id(&self) -> u32;

    /// The token that stands for a video, which no text may spell: videos are not supported.
    fn video_token_id(&self) -> Option<u32> {
        None
    }

    /// What ChatML has before and after an image's placeholder.
    fn image_markup(&self) -> (&'static str, &'static str);

    /// Resizes and crops an image, one of `of` images of its sample. Errors when its proportions do not allow it.
    fn prepare(&self, image: &RgbImage, of: usize) -> Result<ImagePatches>;

    /// How many tokens an image takes.
    fn image_tokens(&self, patches: &ImagePatches) -> usize;

    /// The pictures that an image's tokens show, in the order of the tokens; what is left of those stands for no place.
    fn views(&self, patches: &ImagePatches) -> Vec<View> {
        vec![View::of_first_crop(patches)]
    }

    /// Position of every token on the three axes of rotary embedding; a family with one axis repeats it.
    fn positions(&self, tokens: &[u32], images: &[ImagePatches]) -> Result<Vec<[u32; 3]>>;

    /// Smallest and largest area in pixels that images are brought to; `None` where a family resizes by another rule.
    fn pixel_limits(&self) -> Option<[usize; 2]> {
        None
    }
}

/// A conversation as a model takes it.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// Id of the conversation.
    pub id: String,
    /// Token ids, every image's placeholder repeated once for each of its tokens.
    pub tokens: Vec<u32>,
    /// How many of the tokens stand for images.
    pub vision_tokens: usize,
    /// The images, in the order of their tokens.
    pub images: Vec<ImagePatches>,
    /// Position of every token: temporal, vertical, horizontal.
    pub positions: Vec<[u32; 3]>,
    /// Tokens of the answer with the end-of-turn token; empty when there is no answer.
    pub answer: Range<usize>,
}

/// Turns conversations into sequences with a checkpoint's tokenizer, template and image processor.
pub struct SequenceBuilder {
    tokenizer: Tokenizer,
    template: ChatTemplate,
    vision: Box<dyn VisionInput>,
    placeholder: String,
    /// Text of the video token.
    video: Option<String>,
    end_tokens: Vec<u32>,
}

impl SequenceBuilder {
    /// Reads `tokenizer.json` and the chat template of a checkpoint folder. See [`with_template`](Self::with_template).
    pub fn new(folder: &Path, vision: Box<dyn VisionInput>) -> Result<Self> {
        Self::with_template(folder, vision, &TemplateChoice::Checkpoint)
    }

    /// Reads `tokenizer.json` of a checkpoint folder, and the chat template that is asked for.
    ///
    /// Truncation and padding that earlier tools left in `tokenizer.json` are ignored. Errors when a file is missing or
    /// broken, when the tokenizer does not know the image token, and on a tokenizer other than byte-pair encoding, or with
    /// parts that those of the known families do not have.
    pub fn with_template(folder: &Path, vision: Box<dyn VisionInput>, choice: &TemplateChoice) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        let tokenizer = Tokenizer::read(folder)?;
        let id = vision.image_token_id();
        // An empty one would be found between any two letters.
        let placeholder = tokenizer.token(id).filter(|token| !token.is_empty());
        let placeholder = placeholder
            .with_context(|| format!("{} has no token {id}, the image token of config.json", path.display()))?;
        let video = vision.video_token_id().and_then(|id| tokenizer.token(id)).filter(|token| !token.is_empty());
        let end_tokens = end_tokens(folder, &tokenizer)?;
        let template = match choice {
            TemplateChoice::Checkpoint => ChatTemplate::load(folder)?,
            TemplateChoice::Chatml => {
                let (before, after) = vision.image_markup();
                ChatTemplate::chatml(&format!("{before}{placeholder}{after}"))?
            }
            TemplateChoice::File(path) => ChatTemplate::from_file(path, folder)?,
        };
        let builder = Self { tokenizer, template, vision, placeholder, video, end_tokens };
        let alone = builder.tokenizer.encode(&builder.placeholder, MAX_TOKENS)?;
        ensure!(
            alone.get_ids() == [id],
            "{} splits the image token {:?} of config.json in pieces",
            path.display(),
            builder.placeholder
        );
        Ok(builder)
    }

    /// Tokens that end a turn: `eos_token_id` of generation_config.json and config.json, `eos_token` of
    /// tokenizer_config.json.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// Smallest and largest area of an image, see [`VisionInput::pixel_limits`].
    pub fn pixel_limits(&self) -> Option<[usize; 2]> {
        self.vision.pixel_limits()
    }

    /// Text of decoded tokens, without special tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, true)
    }

    /// What one token stands for, as text; special tokens are spelled out. A token that holds a part of a character only is
    /// a replacement character.
    pub fn piece(&self, token: u32) -> Result<String> {
        self.tokenizer.decode(&[token], false)
    }

    /// How many tokens an image takes, and the pictures that they show; see [`VisionInput::views`].
    pub fn views(&self, image: &ImagePatches) -> (usize, Vec<View>) {
        (self.vision.image_tokens(image), self.vision.views(image))
    }

    /// The tokens of a sequence that stand for images.
    pub fn is_vision(&self, token: u32) -> bool {
        token == self.vision.image_token_id()
    }

    /// The whole conversation, answer included, with no prompt for a further turn. Where the template does not let the answer be told
    /// from the prompt, the sequence has none.
    ///
    /// Errors name the conversation's line: an image missing or broken, the image token written in a text, a template
    /// that fails or does not show every image once.
    pub fn build(&self, conversation: &Conversation) -> Result<Sequence> {
        self.built(conversation, |_| Ok(None))
    }

    /// As [`build`](Self::build), for what is asked of the answer. Errors where it cannot be told from the prompt.
    pub fn build_answered(&self, conversation: &Conversation) -> Result<Sequence> {
        self.built(conversation, Err)
    }

    fn built(
        &self,
        conversation: &Conversation,
        unclear: impl Fn(anyhow::Error) -> Result<Option<usize>>,
    ) -> Result<Sequence> {
        let images = self.images(&conversation.messages, conversation)?;
        self.whole(conversation, images, unclear).with_context(|| conversation.origin.clone())
    }

    /// The conversation up to the answer, with the beginning of the assistant's turn. Errors as [`Self::build`].
    pub fn prompt(&self, conversation: &Conversation) -> Result<Sequence> {
        let images = self.images(conversation.question(), conversation)?;
        let prompt = self.question(conversation, &images).with_context(|| conversation.origin.clone())?;
        Ok(Sequence { images, ..prompt })
    }

    /// [`prompt`](Self::prompt) by the images of the whole conversation, and without them: its tokens alone.
    pub fn prompt_of(&self, conversation: &Conversation, whole: &Sequence) -> Result<Sequence> {
        let images = whole.images.get(..asked(conversation)).unwrap_or(&whole.images);
        self.question(conversation, images).with_context(|| conversation.origin.clone())
    }

    fn images(&self, messages: &[Message], conversation: &Conversation) -> Result<Vec<ImagePatches>> {
        let parts = messages.iter().flat_map(|message| &message.content);
        let sources: Vec<_> = parts
            .filter_map(|part| match part {
                Part::Image(source) => Some(source),
                Part::Text(_) => None,
            })
            .collect();
        let (mut tokens, mut pixels) = (0, 0);
        let images = sources.iter().enumerate().map(|(index, source)| {
            let image = decode(source, &conversation.origin)?;
            let at = || format!("{}: image {}", conversation.origin, index + 1);
            let image = self.vision.prepare(&image, sources.len()).with_context(|| BadImage(at()))?;
            tokens += self.vision.image_tokens(&image);
            pixels += image.crops().iter().map(|crop| crop.as_raw().len() as u64 / 3).sum::<u64>();
            ensure!(
                tokens <= MAX_TOKENS && pixels <= MAX_SAMPLE_PIXELS,
                "{}: with it the sample's images have {tokens} tokens and {pixels} pixels; the limits are {MAX_TOKENS} and \
                 {MAX_SAMPLE_PIXELS}",
                at()
            );
            Ok(image)
        });
        images.collect()
    }

    /// `unclear` is given why an answer cannot be told from the prompt, and says what is then done.
    fn whole(
        &self,
        conversation: &Conversation,
        images: Vec<ImagePatches>,
        unclear: impl Fn(anyhow::Error) -> Result<Option<usize>>,
    ) -> Result<Sequence> {
        if let Some(text) = &conversation.text {
            let sequence = self.sequence(conversation, text, &images, None)?;
            return Ok(Sequence { images, ..sequence });
        }
        let text = self.text(&conversation.messages, false, &images)?;
        let from = match conversation.answer() {
            None => None,
            Some(_) => {
                let prompt = self.text(conversation.question(), true, &images[..asked(conversation)])?;
                answer_start(&text, &prompt).map(Some).or_else(unclear)?
            }
        };
        let sequence = self.sequence(conversation, &text, &images, from)?;
        Ok(Sequence { images, ..sequence })
    }

    fn question(&self, conversation: &Conversation, images: &[ImagePatches]) -> Result<Sequence> {
        if conversation.text.is_some() {
            bail!("plain `text` asks no question; write `messages`");
        }
        let text = self.text(conversation.question(), true, images)?;
        self.sequence(conversation, &text, images, None)
    }

    /// The rendered text with every image's placeholder repeated.
    fn text(&self, messages: &[Message], add_generation_prompt: bool, images: &[ImagePatches]) -> Result<String> {
        for part in messages.iter().flat_map(|message| &message.content) {
            if let Part::Text(text) = part {
                self.refuse_placeholder(text)?;
            }
        }
        let rendered = self.template.render(messages, add_generation_prompt)?;
        let mut pieces = rendered.split(&self.placeholder);
        let mut text = pieces.next().unwrap_or_default().to_string();
        let mut shown = 0;
        for piece in pieces {
            let image = images.get(shown);
            let count = image.map_or(0, |image| self.vision.image_tokens(image));
            text.extend(std::iter::repeat_n(self.placeholder.as_str(), count));
            text.push_str(piece);
            shown += 1;
        }
        ensure!(
            shown == images.len(),
            "the chat template shows {shown} images ({:?}) of the conversation's {}",
            self.placeholder,
            images.len()
        );
        Ok(text)
    }

    /// Text that spells the image token would be taken for an image, or for a video.
    fn refuse_placeholder(&self, text: &str) -> Result<()> {
        let placeholder = &self.placeholder;
        ensure!(
            !text.contains(placeholder),
            "a text contains {placeholder:?}, which stands for an image; write images as parts of their own"
        );
        if let Some(video) = self.video.as_ref().filter(|video| text.contains(*video)) {
            bail!("a text contains {video:?}, which stands for a video: {NO_VIDEO}");
        }
        Ok(())
    }

    /// The sequence without its images. `answer_from`: where the answer begins in `text`, in bytes.
    fn sequence(
        &self,
        conversation: &Conversation,
        text: &str,
        images: &[ImagePatches],
        answer_from: Option<usize>,
    ) -> Result<Sequence> {
        if images.is_empty() {
            self.refuse_placeholder(text)?;
        }
        // Placeholders were counted as the images were read; what is left is text.
        let words = text.len() - text.matches(&self.placeholder).count() * self.placeholder.len();
        ensure!(words <= MAX_BYTES, "the conversation has {words} bytes of text; the limit is {MAX_BYTES}");
        let encoding = self.tokenizer.encode(text, MAX_TOKENS)?;
        let tokens = encoding.get_ids().to_vec();
        ensure!(!tokens.is_empty(), "the conversation has no tokens");
        let answer = answer_from.map_or(0..0, |from| {
            // A token that reaches across the boundary carries some of the answer.
            let start = encoding.get_offsets().iter().position(|&(_, end)| end > from).unwrap_or(tokens.len());
            let last = tokens[start..].iter().rposition(|token| self.end_tokens.contains(token));
            start..last.map_or(tokens.len(), |last| start + last + 1)
        });
        let id = self.vision.image_token_id();
        Ok(Sequence {
            id: conversation.id.clone(),
            vision_tokens: tokens.iter().filter(|&&token| token == id).count(),
            positions: self.vision.positions(&tokens, images)?,
            tokens,
            images: Vec::new(),
            answer,
        })
    }
}

/// Images of what comes before the answer.
fn asked(conversation: &Conversation) -> usize {
    let shown = conversation.question().iter().flat_map(|message| &message.content);
    shown.filter(|part| matches!(part, Part::Image(_))).count()
}

/// Where the answer begins: what `text` has beyond `prompt`. White space at the end of the prompt need not agree:
/// LLaVA-OneVision's template writes `assistant \n` before an answer and `assistant\n` to ask for one.
fn answer_start(text: &str, prompt: &str) -> Result<usize> {
    if text.starts_with(prompt) {
        return Ok(prompt.len());
    }
    let common = prompt.trim_end();
    let rest = text.strip_prefix(common).context(
        "the chat template writes the turns before the answer differently once the answer is there, \
         so the answer cannot be told from the prompt",
    )?;
    Ok(text.len() - rest.trim_start().len())
}

/// Tokens that end an answer, see [`SequenceBuilder::end_tokens`].
fn end_tokens(folder: &Path, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    let mut add = |value: Option<&serde_json::Value>| {
        let listed = value.into_iter().flat_map(|value| match value {
            serde_json::Value::Array(all) => all.as_slice(),
            one => std::slice::from_ref(one),
        });
        ids.extend(listed.filter_map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())));
    };
    if let Some(config) = read_json(folder, "generation_config.json")? {
        add(config.get("eos_token_id"));
    }
    if let Some(config) = read_json(folder, "config.json")? {
        add(config.get("eos_token_id"));
        add(config.get("text_config").and_then(|text| text.get("eos_token_id")));
    }
    if let Some(config) = read_json(folder, "tokenizer_config.json")? {
        let token = config.get("eos_token").and_then(|token| token.as_str().or_else(|| token.get("content")?.as_str()));
        ids.extend(token.and_then(|token| tokenizer.id(token)));
    }
    ids.sort_unstable();
    ids.dedup();
    ensure!(
        !ids.is_empty(),
        "{} names no end-of-turn token: neither `eos_token_id` in generation_config.json or config.json, \
         nor `eos_token` in tokenizer_config.json",
        folder.display()
    );
    Ok(ids)
}

/// Sequences of a calibration set.
#[derive(Debug, Default)]
pub struct Collected {
    /// Sequences that are short enough, in the order of their conversations.
    pub sequences: Vec<Sequence>,
    /// How many conversations were longer than the limit and left out.
    pub too_long: usize,
    /// How many were left out for an image that cannot be read.
    pub bad_images: usize,
}

/// Builds every conversation, in parallel. One longer than `max_tokens` is left out whole, never cut; with `skip_bad_images` so is one
/// with an image that cannot be read, and named in a warning.
///
/// Errors as [`SequenceBuilder::build`] (of several the first in order), when no conversation is left, and as `check`
/// does, which is asked before each.
pub fn collect(
    builder: &SequenceBuilder,
    conversations: &[Conversation],
    max_tokens: usize,
    skip_bad_images: bool,
    check: impl Fn() -> Result<()> + Sync,
) -> Result<Collected> {
    ensure!(!conversations.is_empty(), "there are no conversations");
    // What is too long is dropped at once, so that it does not take memory until the end.
    let built: Vec<Result<Result<Sequence, usize>>> = map(conversations.len(), |i| {
        check()?;
        let sequence = builder.build(&conversations[i])?;
        let length = sequence.tokens.len();
        Ok(if length <= max_tokens { Ok(sequence) } else { Err(length) })
    });
    let mut sequences = Vec::with_capacity(built.len());
    let mut shortest = usize::MAX;
    let (mut too_long, mut bad_images) = (0, 0);
    for sequence in built {
        let sequence = match sequence {
            Err(error) if skip_bad_images && error.is::<BadImage>() => {
                bad_images += 1;
                log::warn!("left out: {error:#}");
                continue;
            }
            other => other?,
        };
        match sequence {
            Ok(sequence) => sequences.push(sequence),
            Err(length) => {
                shortest = shortest.min(length);
                too_long += 1;
            }
        }
    }
    ensure!(
        too_long > 0 || bad_images < conversations.len(),
        "all {bad_images} conversations have an image that cannot be read; the warnings before say why"
    );
    ensure!(
        !sequences.is_empty(),
        "all {too_long} conversations are longer than {max_tokens} tokens, the shortest has {shortest}; \
         raise --max-tokens, or make images smaller (--max-pixels; --image-mode single where a model cuts tiles)"
    );
    if too_long > 0 {
        log::warn!(
            "{too_long} of {} conversations are longer than {max_tokens} tokens and left out",
            conversations.len()
        );
    }
    Ok(Collected { sequences, too_long, bad_images })
}
