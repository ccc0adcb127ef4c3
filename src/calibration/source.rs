//! Where an image comes from, as data files write it: a path, a `file://` URL or a `data:` URI.

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use percent_encoding::percent_decode_str;
use std::path::{Path, PathBuf};

/// An image not yet read.
#[derive(Clone, Debug, PartialEq)]
pub enum ImageSource {
    /// A PNG or JPEG file.
    File(PathBuf),
    /// The bytes of such a file, from a `data:` URI.
    Bytes(Vec<u8>),
}

/// Data URIs come with and without the `=` at the end.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl ImageSource {
    /// Reads `written` as data files write images. A relative path counts from `root`; an absolute one stays as it is.
    ///
    /// Errors on `http(s)` and other URLs, on `file://` URLs of other machines, and on malformed `data:` URIs.
    pub fn parse(written: &str, root: &Path) -> Result<Self> {
        ensure!(!written.is_empty(), "an image is the empty string");
        if let Some(rest) = strip_scheme(written, "data:") {
            return Ok(Self::Bytes(data_uri(rest)?));
        }
        if let Some(rest) = strip_scheme(written, "file://") {
            return Ok(Self::File(file_url(rest).with_context(|| format!("image {written:?}"))?));
        }
        if let Some((scheme, _)) = written.split_once("://") {
            let hint = "download the image and give its path";
            bail!("image {written:?}: {scheme} URLs are not fetched (no network access); {hint}");
        }
        Ok(Self::File(root.join(written)))
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
    let bytes: Vec<u8> = percent_decode_str(body).collect();
    if !header.split(';').any(|parameter| parameter.trim().eq_ignore_ascii_case("base64")) {
        return Ok(bytes);
    }
    let compact: Vec<u8> = bytes.into_iter().filter(|byte| !byte.is_ascii_whitespace()).collect();
    BASE64.decode(compact).context("an image's data: URI is not valid base64")
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

    fn parse(written: &str) -> Result<ImageSource> {
        ImageSource::parse(written, Path::new("/data"))
    }

    #[test]
    fn every_way_of_writing_an_image() {
        let file = |path: &str| ImageSource::File(PathBuf::from(path));
        for (written, source) in [
            ("a/b.png", file("/data/a/b.png")),
            ("100%25.png", file("/data/100%25.png")),
            ("/abs/b.png", file("/abs/b.png")),
            ("file:///abs/a%20b.png", file("/abs/a b.png")),
            ("FILE://localhost/abs/%C3%A9.png", file("/abs/é.png")),
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
            ("data:image/png;base64", "comma"),
            ("data:image/png;base64,a*b", "base64"),
        ] {
            let error = format!("{:#}", parse(written).unwrap_err());
            assert!(error.contains(message), "{written}: {error}");
        }
    }
}
