//! Reading a request's body: bounded in size and in patience.

use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

use super::error::ApiError;

/// Bytes of a body, at most: several times the longest prompt of any model here.
pub(super) const BODY_LIMIT: usize = 8 << 20;
/// The longest pause between two pieces of a body.
pub(super) const BODY_PAUSE: Duration = Duration::from_secs(20);
/// A body over the limit is read on and thrown away within these bounds, so that a client that sends
/// before it reads gets to see the answer.
const DISCARD_LIMIT: usize = 64 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// Refuses a content type that is not JSON; none at all is taken for JSON.
pub(super) fn expect_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let text = String::from_utf8_lossy(value.as_bytes());
    let essence = text.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        Ok(())
    } else {
        Err(ApiError::media_type(&text))
    }
}

/// The whole body.
pub(super) async fn read(body: Body) -> Result<Bytes, ApiError> {
    read_within(body, BODY_LIMIT, BODY_PAUSE).await
}

async fn read_within(mut body: Body, limit: usize, pause: Duration) -> Result<Bytes, ApiError> {
    let mut all = BytesMut::new();
    let mut over: Option<(Instant, usize)> = None;
    loop {
        let frame = match tokio::time::timeout(pause, body.frame()).await {
            Err(_) => return Err(ApiError::too_slow(pause.as_secs())),
            Ok(None) => break,
            Ok(Some(Err(e))) => return Err(ApiError::malformed(format!("the body broke off: {e}"))),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        match &mut over {
            None if all.len() + data.len() <= limit => all.extend_from_slice(&data),
            None => over = Some((Instant::now(), data.len())),
            Some((since, discarded)) => {
                *discarded += data.len();
                if *discarded > DISCARD_LIMIT || since.elapsed() > DISCARD_TIME {
                    break;
                }
            }
        }
    }
    if over.is_some() { Err(ApiError::too_large(limit)) } else { Ok(all.freeze()) }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;

    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
    }

    #[test]
    fn a_body_over_the_limit_is_413_and_one_at_it_is_read() {
        let read = |n: usize| block_on(read_within(Body::from(vec![b'x'; n]), 100, BODY_PAUSE));
        assert_eq!(read(100).unwrap().len(), 100);
        assert_eq!(read(101).unwrap_err().into_response().status(), 413);
    }

    #[test]
    fn a_body_that_stops_coming_is_408() {
        let never = futures_util::stream::pending::<Result<Bytes, std::io::Error>>();
        let error = block_on(read_within(Body::from_stream(never), 100, Duration::from_millis(10)));
        assert_eq!(error.unwrap_err().into_response().status(), 408);
    }

    #[test]
    fn only_json_is_taken() {
        let of = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, value.parse().unwrap());
            expect_json(&headers).is_ok()
        };
        assert!(expect_json(&HeaderMap::new()).is_ok());
        assert!(of("application/json; charset=utf-8") && of("Application/vnd.x+json"));
        assert!(!of("text/plain") && !of("application/x-www-form-urlencoded"));
    }
}
