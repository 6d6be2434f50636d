//! Reading a request's body: bounded in size and in patience.

use std::time::{Duration, Instant};

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;

use super::error::ApiError;

/// What a client may send, and how long it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long a request's head may take, and an idle connection is kept.
    pub head: Duration,
    /// The longest pause between two pieces of a body.
    pub body_pause: Duration,
    /// How long a whole body may take.
    pub body: Duration,
    /// Bytes of a body, at most.
    pub body_bytes: usize,
    /// How long a client may take nothing of what is there for it.
    pub write: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head: Duration::from_secs(30),
            body_pause: Duration::from_secs(20),
            body: Duration::from_secs(120),
            // Several times the longest prompt of any model here.
            body_bytes: 8 << 20,
            write: Duration::from_secs(60),
        }
    }
}

/// A body over the limit is read on and thrown away within these bounds, so that a client that sends
/// before it reads gets to see the answer.
const DISCARD_LIMIT: usize = 64 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(5);

/// Refuses a content type that is not JSON; none at all is taken for JSON.
fn expect_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let text = String::from_utf8_lossy(value.as_bytes());
    let essence = text.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        Ok(())
    } else {
        Err(ApiError::media_type(&text))
    }
}

/// The whole body, which must be JSON by its content type.
pub(super) async fn read(request: Request, limits: &Limits) -> Result<Bytes, ApiError> {
    expect_json(request.headers())?;
    let waits = request.headers().contains_key(header::EXPECT);
    let body = request.into_body();
    if waits && body.size_hint().lower() > limits.body_bytes as u64 {
        // Nothing has been sent yet, and nothing need be.
        return Err(ApiError::too_large(limits.body_bytes));
    }
    read_within(body, limits).await
}

async fn read_within(mut body: Body, limits: &Limits) -> Result<Bytes, ApiError> {
    let mut all = BytesMut::new();
    let mut over: Option<(Instant, usize)> = None;
    let end = Instant::now() + limits.body;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let frame = match tokio::time::timeout(limits.body_pause.min(left), body.frame()).await {
            Err(_) if left <= limits.body_pause => {
                return Err(ApiError::too_slow(format!("it may take {} s", limits.body.as_secs_f64())));
            }
            Err(_) => {
                let pause = limits.body_pause.as_secs_f64();
                return Err(ApiError::too_slow(format!("nothing came for {pause} s")));
            }
            Ok(None) => break,
            Ok(Some(Err(e))) => return Err(ApiError::bad("body", format!("the body broke off: {e}"))),
            Ok(Some(Ok(frame))) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        match &mut over {
            None if all.len() + data.len() <= limits.body_bytes => all.extend_from_slice(&data),
            None => {
                over = Some((Instant::now(), data.len()));
                all = BytesMut::new();
            }
            Some((since, discarded)) => {
                *discarded += data.len();
                if *discarded > DISCARD_LIMIT || since.elapsed() > DISCARD_TIME {
                    break;
                }
            }
        }
    }
    if over.is_some() { Err(ApiError::too_large(limits.body_bytes)) } else { Ok(all.freeze()) }
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;
    use futures_util::StreamExt;

    use super::*;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
    }

    #[test]
    fn a_body_over_the_limit_is_413_and_one_at_it_is_read() {
        let limits = Limits { body_bytes: 100, ..Limits::default() };
        let read = |n: usize| block_on(read_within(Body::from(vec![b'x'; n]), &limits));
        assert_eq!(read(100).unwrap().len(), 100);
        assert_eq!(read(101).unwrap_err().into_response().status(), 413);
    }

    #[test]
    fn a_body_that_stops_coming_is_408_and_so_is_one_that_drips() {
        let limits = Limits {
            body_pause: Duration::from_millis(20),
            body: Duration::from_millis(60),
            ..Limits::default()
        };
        let never = futures_util::stream::pending::<Result<Bytes, std::io::Error>>();
        let drip = futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from_static(b" ")));
        let drip = drip.then(|piece| async {
            tokio::time::sleep(Duration::from_millis(2)).await;
            piece
        });
        for (body, says) in
            [(Body::from_stream(never), "nothing came"), (Body::from_stream(drip), "may take")]
        {
            let error = block_on(read_within(body, &limits)).unwrap_err();
            assert!(format!("{error:?}").contains(says), "{error:?}");
            assert_eq!(error.into_response().status(), 408);
        }
    }

    #[test]
    fn a_client_that_asks_first_is_told_before_it_sends() {
        let limits = Limits { body_bytes: 100, ..Limits::default() };
        let request = Request::builder().header("expect", "100-continue").body(Body::from(vec![0; 101]));
        assert_eq!(
            block_on(super::read(request.unwrap(), &limits)).unwrap_err().into_response().status(),
            413
        );
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
