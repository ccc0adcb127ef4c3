//! Where an image comes from, as data files write it: a path, a `file://` URL or a `data:` URI.

use super::paths::path_inside;
use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use percent_encoding::percent_decode_str;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An image not yet read.
#[derive(Clone, Debug, PartialEq)]
pub enum ImageSource {
    /// An image file, wherever it is: named by a program or a user.
    File(PathBuf),
    /// Such a file as a data file names it: it must lie below a folder, and so must what links on the way lead to.
    Below {
        /// The folder.
        root: Arc<Path>,
        /// The file, the folder's path included.
        path: PathBuf,
    },
    /// The bytes of such a file, from a `data:` URI.
    Bytes(Vec<u8>),
}

/// Data URIs come with and without the `=` at the end.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl ImageSource {
    /// Reads `written` as data files write images. A relative path counts from `root`.
    ///
    /// Errors on `http(s)` and other URLs, on `file://` URLs of other machines, on malformed `data:` URIs, and on a path
    /// that leads out of `root`, be it absolute or by `..`; links are followed, and asked the same, when the image is read.
    pub fn parse(written: &str, root: &Arc<Path>) -> Result<Self> {
        ensure!(!written.is_empty(), "an image is the empty string");
        if let Some(rest) = strip_scheme(written, "data:") {
            return Ok(Self::Bytes(data_uri(rest)?));
        }
        if let Some(bytes) = bare_base64(written) {
            return Ok(Self::Bytes(bytes));
        }
        if let Some(rest) = strip_scheme(written, "file://") {
            return Self::below(root, written, &file_url(rest).with_context(|| format!("image {}", shown(written)))?);
        }
        if let Some((scheme, _)) = written.split_once("://") {
            let hint = "download the image and give its path";
            bail!("image {}: {} URLs are not fetched (no network access); {hint}", shown(written), shown(scheme));
        }
        Self::below(root, written, Path::new(written))
    }

    fn below(root: &Arc<Path>, written: &str, path: &Path) -> Result<Self> {
        let path = path_inside(path, root).with_context(|| {
            format!(
                "image {} must lie in the data file's folder; where all images lie in another, give --image-root DIR",
                shown(written)
            )
        })?;
        Ok(Self::Below { root: Arc::clone(root), path })
    }
}

/// A string of a data file in quotes, as messages show it: a long one is cut.
pub(super) fn shown(text: &str) -> String {
    const MOST: usize = 100;
    match text.char_indices().nth(MOST) {
        None => format!("{text:?}"),
        Some((end, _)) => format!("{:?}… ({} bytes)", &text[..end], text.len()),
    }
}

/// The bytes of an image that stands there in base64 without a `data:` before it: told from a path by how encoded PNG, JPEG, GIF,
/// WebP, BMP and TIFF files begin, and by its letters.
fn bare_base64(written: &str) -> Option<Vec<u8>> {
    const BEGINNINGS: [&str; 8] = ["iVBORw0KGgo", "/9j/", "R0lGODdh", "R0lGODlh", "UklGR", "Qk", "SUkqA", "TU0AK"];
    // Shorter than the smallest image.
    const LEAST: usize = 64;
    let begins = BEGINNINGS.iter().any(|beginning| written.starts_with(beginning));
    if !begins
        || written.len() < LEAST
        || !written.bytes().all(|b| b.is_ascii_alphanumeric() || b"+/=\r\n".contains(&b))
    {
        return None;
    }
    BASE64.decode(without_space(written.as_bytes().into())).ok()
}

/// Copies nothing where there is none: such a text may be a third longer than the largest image.
fn without_space(text: Cow<'_, [u8]>) -> Cow<'_, [u8]> {
    match text.iter().any(u8::is_ascii_whitespace) {
        true => text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect(),
        false => text,
    }
}

/// Schemes are case-insensitive (RFC 3986, section 3.1).
fn strip_scheme<'a>(written: &'a str, scheme: &str) -> Option<&'a str> {
    let head = written.get(..scheme.len())?;
    head.eq_ignore_ascii_case(scheme).then(|| &written[scheme.len()..])
}

/// Decodes what follows `data:` (RFC 2397).
fn data_uri(rest: &str) -> Result<Vec<u8>> {
    let (header, body) = rest.split_once(',').context("an image's data: URI has no comma before its data")?;
    let bytes = Cow::from(percent_decode_str(body));
    if !header.split(';').any(|parameter| parameter.trim().eq_ignore_ascii_case("base64")) {
        return Ok(bytes.into_owned());
    }
    BASE64.decode(without_space(bytes)).context("an image's data: URI is not valid base64")
}

/// Decodes what follows `file://`: an optional `localhost`, then an absolute path, percent-encoded (RFC 8089).
fn file_url(rest: &str) -> Result<PathBuf> {
    let slash = rest.find('/').context("a file:// URL needs an absolute path: file:///folder/image.png")?;
    let host = &rest[..slash];
    if !host.is_empty() && !host.eq_ignore_ascii_case("localhost") {
        bail!("names the machine {host:?}; write file:///folder/image.png for a file on this one");
    }
    let path = percent_decode_str(&rest[slash..]).decode_utf8().context("the URL's path is not UTF-8")?;
    Ok(PathBuf::from(path.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Arc<Path> {
        Path::new("/data").into()
    }

    fn parse(written: &str) -> Result<ImageSource> {
        ImageSource::parse(written, &root())
    }

    #[test]
    fn every_way_of_writing_an_image() {
        let file = |path: &str| ImageSource::Below { root: root(), path: PathBuf::from(path) };
        for (written, source) in [
            ("a/b.png", file("/data/a/b.png")),
            ("100%25.png", file("/data/100%25.png")),
            ("a/../b.png", file("/data/b.png")),
            ("/data/b.png", file("/data/b.png")),
            ("file:///data/a%20b.png", file("/data/a b.png")),
            ("FILE://localhost/data/%C3%A9.png", file("/data/é.png")),
            ("data:image/png;base64,aGk=", ImageSource::Bytes(b"hi".into())),
            ("data:image;base64,aG\nk", ImageSource::Bytes(b"hi".into())),
            ("data:;base64,aGk%3D", ImageSource::Bytes(b"hi".into())),
            ("data:,h%69", ImageSource::Bytes(b"hi".into())),
        ] {
            assert_eq!(parse(written).unwrap(), source, "{written}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        for (written, message) in [
            ("", "empty"),
            ("https://example.org/a.png", "not fetched"),
            ("s3://bucket/a.png", "not fetched"),
            ("file://server/a.png", "\"server\""),
            ("file://a.png", "absolute path"),
            ("file:///%ff.png", "UTF-8"),
            ("../a.png", "--image-root"),
            ("a/../../data/a.png", "leads out of /data"),
            ("/etc/passwd", "lies outside /data"),
            ("file:///data/%2e%2e/etc/passwd", "lies outside /data"),
            ("data:image/png;base64", "comma"),
            ("data:image/png;base64,a*b", "base64"),
        ] {
            let error = format!("{:#}", parse(written).unwrap_err());
            assert!(error.contains(message), "{written}: {error}");
        }
    }
}
