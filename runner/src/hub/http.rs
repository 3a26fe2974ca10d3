//! The hub's protocol over HTTP.
//!
//! A server names the commit of a revision and its files. Of a file, the hub itself tells hash and size; the content of large
//! ones comes from another host, to which it redirects. That host gets no token.

use std::time::Duration;

use serde::Deserialize;
use titer_core::bounds;
use titer_core::{Error, Result};
use ureq::http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderName, LOCATION, RANGE};
use ureq::http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Body};

use super::cache::{path_in, variable};
use super::{Announced, HubName, Listing, Rest, Server, is_plain};

/// The longest list of files that a repository may have.
const LISTING_BYTES: u64 = 1 << 26;
/// The longest file of certificates.
const CERTIFICATES_BYTES: u64 = 1 << 26;
/// Redirects from one address to the next.
const REDIRECTS: usize = 8;
/// How long a server may take for a connection, or say nothing.
const PATIENCE: Duration = Duration::from_secs(30);

/// Hash and size of a file whose content another host has.
const LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
const LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");

/// A client of one endpoint. It must not be shown: it holds the token.
pub(super) struct Client {
    agent: Agent,
    /// Without a slash at its end.
    endpoint: String,
    address: Uri,
    /// What proves who asks.
    credentials: Option<HeaderValue>,
}

impl Client {
    pub(super) fn new(endpoint: &str, token: Option<String>) -> Result<Self> {
        let wrong = |why: &str| {
            Error::config(format!("HF_ENDPOINT {why}"))
                .help("write https://host, or file:///folder for a mirror on disk")
        };
        let address: Uri = endpoint.parse().map_err(|_| wrong("is no address"))?;
        if !["http", "https"].contains(&address.scheme_str().unwrap_or_default()) || address.host().is_none() {
            return Err(wrong("is no address of the web"));
        }
        // Such an address would be shown with its password.
        if address.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            return Err(wrong("holds a user's name"));
        }
        let credentials = token.map(|token| bearer(&token)).transpose()?;
        let patience = variable("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|seconds| seconds.parse().ok());
        let patience = Some(patience.map_or(PATIENCE, Duration::from_secs));
        let agent = Agent::config_builder()
            .user_agent(concat!("titer/", env!("CARGO_PKG_VERSION")))
            // A size is that of the file.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .tls_config(TlsConfig::builder().root_certs(roots()?).build())
            .timeout_resolve(patience)
            .timeout_connect(patience)
            .timeout_send_request(patience)
            .timeout_recv_response(patience)
            .timeout_per_read(patience)
            .build()
            .into();
        Ok(Self { agent, endpoint: endpoint.to_owned(), address, credentials })
    }

    /// Asks for a path of the endpoint, and follows redirects; of a question for headers only those within the endpoint, as it
    /// is the hub itself that knows the file.
    fn ask(&self, name: &HubName, method: &Method, path: &str, from: u64) -> Result<Response<Body>> {
        let odd = |what: &str| {
            Error::data(format!("the hub redirects {what}"))
                .help("check HF_ENDPOINT, and whether a proxy stands between")
        };
        let mut address: Uri = format!("{}/{path}", self.endpoint)
            .parse()
            .map_err(|error| Error::config("the name makes no address").source(error).help("check the name"))?;
        for _ in 0..=REDIRECTS {
            let response = self.ask_once(method, &address, from)?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            if !status.is_redirection() {
                return Err(self.refused(name, status));
            }
            let next = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = next.and_then(|next| resolved(&address, next)).ok_or_else(|| odd("to no address"))?;
            if method == Method::HEAD && !same_origin(&next, &self.address) {
                return Ok(response);
            }
            if address.scheme_str() == Some("https") && next.scheme_str() != Some("https") {
                return Err(odd("to an address without encryption"));
            }
            address = next;
        }
        Err(odd("without end"))
    }

    fn ask_once(&self, method: &Method, address: &Uri, from: u64) -> Result<Response<Body>> {
        let mut request = Request::builder().method(method).uri(address);
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        if let Some(credentials) = self.credentials.as_ref().filter(|_| same_origin(address, &self.address)) {
            request = request.header(AUTHORIZATION, credentials);
        }
        let unreachable = |error: Box<dyn std::error::Error + Send + Sync>| {
            let host = address.authority().map_or("", |authority| authority.as_str());
            Error::data(format!("cannot get an answer from {host}"))
                .source(error)
                .help("check the connection, HTTPS_PROXY, SSL_CERT_FILE and HF_ENDPOINT; with --offline, what is in the cache is used")
        };
        let request = request.body(()).map_err(|error| unreachable(error.into()))?;
        self.agent.run(request).map_err(|error| unreachable(error.into()))
    }

    /// The error of a server that says no.
    fn refused(&self, name: &HubName, status: StatusCode) -> Error {
        let page = format!("{}/{}", self.endpoint, name.repository);
        let help = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => format!(
                "check the name; if it is right, accept the licence at {page} and set HF_TOKEN to a token of that \
                 account that may read it"
            ),
            StatusCode::NOT_FOUND => format!("check the name and the revision at {page}"),
            StatusCode::TOO_MANY_REQUESTS => "wait some minutes, or set HF_TOKEN, which raises the limit".to_owned(),
            _ => "try again later; with --offline, what is in the cache is used".to_owned(),
        };
        Error::data(format!("the hub does not give `{}`", name.repository)).at("status", status.to_string()).help(help)
    }
}

impl Server for Client {
    fn list(&self, name: &HubName) -> Result<Listing> {
        let kind = if name.is_data() { "" } else { "models/" };
        let path = format!("api/{kind}{}/revision/{}", name.repository, encoded(name.revision(), ""));
        let mut response = self.ask(name, &Method::GET, &path, 0)?;
        let bytes = response.body_mut().with_config().limit(LISTING_BYTES).read_to_vec();
        let bytes = bytes.map_err(|error| unexpected("the list of files cannot be read").source(error))?;
        let answer: RepositoryAnswer = serde_json::from_slice(&bytes)
            .map_err(|error| unexpected("the list of files is not in the hub's form").source(error))?;
        if !is_plain(&answer.sha) {
            return Err(unexpected("the hub names no commit"));
        }
        Ok(Listing { commit: answer.sha, names: answer.siblings.into_iter().map(|file| file.rfilename).collect() })
    }

    fn announce(&self, name: &HubName, commit: &str, file: &str) -> Result<Announced> {
        let response = self.ask(name, &Method::HEAD, &content(name, commit, file), 0)?;
        let headers = response.headers();
        let text = |header: HeaderName| headers.get(header).and_then(|value| value.to_str().ok());
        // Of a redirect, the length is that of its own text.
        let length = || text(CONTENT_LENGTH).filter(|_| response.status().is_success());
        let etag = text(LINKED_ETAG).or_else(|| text(ETAG)).map(|etag| etag.trim_start_matches("W/").trim_matches('"'));
        let size = text(LINKED_SIZE).or_else(length).and_then(|size| size.parse().ok());
        match (etag.filter(|etag| is_plain(etag)), size) {
            (Some(etag), Some(size)) => Ok(Announced { etag: etag.to_owned(), size }),
            _ => Err(unexpected(&format!("the hub tells no hash and size of `{file}`"))),
        }
    }

    fn read(&self, name: &HubName, commit: &str, file: &str, from: u64) -> Result<Rest> {
        let response = self.ask(name, &Method::GET, &content(name, commit, file), from)?;
        let start = || {
            let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
            range.strip_prefix("bytes ")?.split_once('-')?.0.parse::<u64>().ok()
        };
        // Whoever does not know ranges sends the whole.
        let whole = response.status() != StatusCode::PARTIAL_CONTENT;
        if !whole && start() != Some(from) {
            return Err(unexpected(&format!("the hub sends another part of `{file}` than was asked for")));
        }
        Ok(Rest { from: if whole { 0 } else { from }, body: Box::new(response.into_body().into_reader()) })
    }
}

/// The header with a token, which no log shows.
fn bearer(token: &str) -> Result<HeaderValue> {
    let mut header = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| {
        Error::config("the token of the hub holds characters that no token has")
            .help("set HF_TOKEN to it without quotes and spaces, or log in again with `hf auth login`")
    })?;
    header.set_sensitive(true);
    Ok(header)
}

/// The certificates to trust: those of the file that `SSL_CERT_FILE` names, as a company's proxy needs them, or else Mozilla's.
fn roots() -> Result<RootCerts> {
    let Some(path) = path_in("SSL_CERT_FILE") else { return Ok(RootCerts::WebPki) };
    let bytes = bounds::read_file("read the certificates of SSL_CERT_FILE", &path, CERTIFICATES_BYTES)?;
    let certificates = parse_pem(&bytes).filter_map(|item| match item {
        Ok(PemItem::Certificate(certificate)) => Some(certificate),
        _ => None,
    });
    Ok(certificates.into())
}

/// What the hub says of a revision, as far as it matters.
#[derive(Deserialize)]
struct RepositoryAnswer {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

fn unexpected(what: &str) -> Error {
    Error::data(what)
        .help("check that HF_ENDPOINT is a server of the hub's protocol, and whether a proxy stands between")
}

/// The path of a file's content.
fn content(name: &HubName, commit: &str, file: &str) -> String {
    format!("{}/resolve/{commit}/{}", name.repository, encoded(file, "/"))
}

/// `text` as a part of an address, with what is no letter, digit or one of `kept` by its number.
fn encoded(text: &str, kept: &str) -> String {
    let stays = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || kept.as_bytes().contains(&byte);
    text.bytes().map(|byte| if stays(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// Where a redirect from `address` leads.
fn resolved(address: &Uri, location: &str) -> Option<Uri> {
    let (scheme, authority) = (address.scheme_str()?, address.authority()?);
    let whole = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        location.to_owned()
    };
    let whole: Uri = whole.parse().ok()?;
    (["http", "https"].contains(&whole.scheme_str()?) && whole.host().is_some()).then_some(whole)
}

/// Whether two addresses are of one server.
fn same_origin(one: &Uri, other: &Uri) -> bool {
    let port =
        |uri: &Uri| uri.port_u16().or_else(|| uri.scheme_str().map(|scheme| if scheme == "https" { 443 } else { 80 }));
    let host = |uri: &Uri| uri.host().map(str::to_lowercase);
    one.scheme() == other.scheme() && host(one) == host(other) && port(one) == port(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn redirects_lead_to_addresses_of_the_web() {
        let from = uri("https://hub.test/a/b");
        for (location, expected) in [
            ("/c?d=1", Some("https://hub.test/c?d=1")),
            ("//cdn.test/c", Some("https://cdn.test/c")),
            ("https://cdn.test:8443/c", Some("https://cdn.test:8443/c")),
            ("file:///etc/passwd", None),
            ("c", None),
            ("", None),
        ] {
            assert_eq!(resolved(&from, location), expected.map(uri), "{location}");
        }
    }

    #[test]
    fn only_the_same_server_is_trusted() {
        let hub = uri("https://hub.test/x");
        assert!(
            ["https://hub.test/", "https://HUB.test:443/y"].into_iter().all(|other| same_origin(&uri(other), &hub))
        );
        let others = ["http://hub.test/", "https://hub.test:8443/", "https://hub.test.evil/", "https://cdn.hub.test/"];
        assert!(!others.into_iter().any(|other| same_origin(&uri(other), &hub)));
    }

    #[test]
    fn revisions_are_one_part_of_an_address() {
        assert_eq!(encoded("refs/pr/1", ""), "refs%2Fpr%2F1");
        assert_eq!(encoded("a b/é?#%.json", "/"), "a%20b/%C3%A9%3F%23%25.json");
    }

    #[test]
    fn endpoints_and_tokens_that_are_none_are_refused() {
        let refused = |endpoint: &str, token: Option<&str>| {
            let error = Client::new(endpoint, token.map(str::to_owned)).err().unwrap().to_string();
            assert!(error.contains("help: ") && !error.contains("secret"), "{error}");
        };
        for endpoint in ["", "hub.test", "ftp://hub.test", "https://", "https://me:secret@hub.test"] {
            refused(endpoint, None);
        }
        refused("https://hub.test", Some("secret\nX-Evil: 1"));
        assert!(Client::new("http://127.0.0.1:1/hf", Some("secret".into())).is_ok());
    }
}
