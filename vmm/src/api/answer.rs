//! What requests are answered with.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::observe::Refusal;

/// What an error says.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Problem {
    pub(super) error: String,
}

/// An error with its status.
#[derive(Debug)]
pub(super) struct Failure(pub(super) StatusCode, pub(super) String);

impl Failure {
    pub(super) fn bad(why: impl ToString) -> Failure {
        Failure(StatusCode::BAD_REQUEST, why.to_string())
    }

    pub(super) fn conflict(why: impl ToString) -> Failure {
        Failure(StatusCode::CONFLICT, why.to_string())
    }

    pub(super) fn gone() -> Failure {
        Failure(StatusCode::SERVICE_UNAVAILABLE, "the machine is ending".into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.0, Json(Problem { error: self.1 })).into_response()
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        match refusal {
            Refusal::Snapshot(error) if error.is_refusal() => Failure::conflict(error),
            Refusal::Live(_) | Refusal::Complete(_) | Refusal::Snapshot(_) => {
                Failure(StatusCode::INTERNAL_SERVER_ERROR, refusal.to_string())
            }
            refusal => Failure::conflict(refusal),
        }
    }
}

/// A body of JSON; nothing at all is an empty object.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Body<T>, Failure> {
        let bytes = axum::body::Bytes::from_request(request, state).await;
        let bytes = bytes.map_err(|error| Failure(error.status(), error.body_text()))?;
        let text = if bytes.is_empty() { &b"{}"[..] } else { &bytes };
        let value = Json::<T>::from_bytes(text).map_err(|error| match error {
            // As any other request that cannot be understood.
            JsonRejection::JsonDataError(error) => Failure::bad(error.body_text()),
            error => Failure(error.status(), error.body_text()),
        })?;
        Ok(Body(value.0))
    }
}
