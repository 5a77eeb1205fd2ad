//! The routes and the layers around them, in one place. A handler gets in by `routes!` alone, which takes its
//! documentation along: no route is undocumented, and no documented one is missing.

use axum::Router;
use axum::extract::Request;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use utoipa::OpenApi;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::openapi::{Content, ContentBuilder, ObjectBuilder, Ref, RefOr, ResponseBuilder, Type};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::context::Context;
use super::error::ApiError;
use super::routes::{audit, domains, edges, events, instances, logs, machines, moves, services, system};
use super::{access, idempotency, outer};
use crate::codes;
use crate::types::Problem;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Peregrine",
        description = "Moves services between machines while they serve. Instants are RFC 3339 in UTC; durations are \
            integers with their unit at the end of the name; ids are strings. Unknown fields of requests are \
            refused, unknown fields of answers are to be ignored."
    ),
    components(schemas(Problem)),
    security(("token" = [])),
    tags(
        (name = "moves", description = "Every rollout: deploy, move, rollback, scale"),
        (name = "services", description = "What is to run, and its versions"),
        (name = "machines", description = "Where it runs"),
        (name = "domains", description = "Names that are served over TLS"),
        (name = "certificates", description = "What they are served with"),
        (name = "edges", description = "Edges in other processes"),
        (name = "instances", description = "Running copies"),
        (name = "events", description = "What happens, as it happens"),
        (name = "logs", description = "What instances write"),
        (name = "audit", description = "Who asked for what, and how it ended, sealed"),
        (name = "system", description = "The server itself"),
    )
)]
struct Document;

/// The routes without their layers, and their document.
fn documented() -> (Router<Context>, utoipa::openapi::OpenApi) {
    let (router, mut document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(machines::list_machines, machines::add_machine))
        .routes(routes!(machines::get_machine, machines::remove_machine))
        .routes(routes!(machines::check_machine))
        .routes(routes!(edges::list_edges))
        .routes(routes!(edges::invite_edge))
        .routes(routes!(edges::remove_edge))
        .routes(routes!(domains::list_domains, domains::add_domain))
        .routes(routes!(domains::get_domain, domains::remove_domain))
        .routes(routes!(domains::check_domain))
        .routes(routes!(domains::renew_certificate))
        .routes(routes!(domains::export_certificate))
        .routes(routes!(domains::list_certificates, domains::import_certificate))
        .routes(routes!(services::list_services))
        .routes(routes!(services::get_service, services::put_service, services::remove_service))
        .routes(routes!(services::list_deployments, services::deploy))
        .routes(routes!(services::rollback_service))
        .routes(routes!(services::scale_service))
        .routes(routes!(logs::service_logs))
        .routes(routes!(moves::list_moves, moves::create_move))
        .routes(routes!(moves::plan_move))
        .routes(routes!(moves::get_move))
        .routes(routes!(moves::pause_move))
        .routes(routes!(moves::resume_move))
        .routes(routes!(moves::promote_move))
        .routes(routes!(moves::abort_move))
        .routes(routes!(moves::rollback_move))
        .routes(routes!(moves::clean_up_move))
        .routes(routes!(moves::get_receipt))
        .routes(routes!(events::follow_move))
        .routes(routes!(events::follow_events))
        .routes(routes!(instances::list_instances))
        .routes(routes!(instances::get_instance))
        .routes(routes!(logs::instance_logs))
        .routes(routes!(audit::list_audit))
        .routes(routes!(audit::verify_audit))
        .routes(routes!(system::status))
        .routes(routes!(system::version))
        .routes(routes!(system::openapi))
        .routes(routes!(system::livez))
        .routes(routes!(system::readyz))
        .routes(routes!(system::metrics))
        .split_for_parts();
    complete(&mut document);
    (router, document)
}

/// The OpenAPI document, as it is served and kept in the repository.
#[must_use]
pub fn openapi_json() -> String {
    let text = documented().1.to_pretty_json().unwrap_or_default();
    text + "\n"
}

/// The whole service: routes, fallbacks, layers.
pub(super) fn router(context: &Context) -> Router {
    documented()
        .0
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(from_fn_with_state(context.clone(), idempotency::once))
        .layer(from_fn_with_state(context.clone(), access::checked))
        .layer(from_fn_with_state(context.clone(), outer::wrapped))
        .with_state(context.clone())
}

async fn no_such_route(request: Request) -> ApiError {
    ApiError::new(&codes::NO_ROUTE, format!("there is no route {}", request.uri().path()))
}

async fn no_such_method(request: Request) -> Response {
    let detail = format!("{} does not know {}", request.uri().path(), request.method());
    ApiError::new(&codes::METHOD, detail).into_response()
}

/// Adds what is the same for all: the token, the problem as answer to anything that fails, the headers.
fn complete(document: &mut utoipa::openapi::OpenApi) {
    let components = document.components.get_or_insert_default();
    let token = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    components.add_security_scheme("token", token);
    for item in document.paths.paths.values_mut() {
        let operations = [&mut item.get, &mut item.put, &mut item.delete].into_iter().flatten();
        operations.for_each(fails_with_a_problem);
        if let Some(post) = &mut item.post {
            fails_with_a_problem(post);
            takes_an_idempotency_key(post);
        }
    }
}

fn fails_with_a_problem(operation: &mut Operation) {
    let schema = RefOr::Ref(Ref::from_schema_name("Problem"));
    let content: Content = ContentBuilder::new().schema(Some(schema)).build();
    let problem = ResponseBuilder::new()
        .description("What was not done, why, and what to do next (RFC 9457)")
        .content("application/problem+json", content)
        .header("x-request-id", HeaderBuilder::new().description(Some("Id of the request")).build())
        .build();
    operation.responses.responses.insert("default".to_owned(), RefOr::T(problem));
}

fn takes_an_idempotency_key(operation: &mut Operation) {
    let key = ParameterBuilder::new()
        .name("Idempotency-Key")
        .parameter_in(ParameterIn::Header)
        .description(Some("A repeated request with the same key gets the same answer, for 24 h"))
        .schema(Some(ObjectBuilder::new().schema_type(Type::String).max_length(Some(255))))
        .build();
    operation.parameters.get_or_insert_default().push(key.into());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The golden file: what is in it is the public contract.
    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");

    #[test]
    fn the_document_is_the_one_in_the_repository() {
        let document = openapi_json();
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(GOLDEN, &document).unwrap();
        }
        let golden = std::fs::read_to_string(GOLDEN).unwrap_or_default();
        assert!(
            document == golden,
            "the API has changed: look at the difference after `BLESS=1 cargo test -p peregrine-api the_document`, \
             and commit api/openapi.json if it is meant"
        );
    }

    #[test]
    fn the_document_is_openapi_3_1_with_unique_ids_and_a_problem_for_every_failure() {
        let document: serde_json::Value = serde_json::from_str(&openapi_json()).unwrap();
        assert_eq!(document["openapi"], "3.1.0");
        let mut ids = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                ids.push(operation["operationId"].as_str().unwrap().to_owned());
                assert!(operation["responses"]["default"].is_object(), "{method} {path}");
                assert!(operation["summary"].is_string(), "{method} {path}");
            }
        }
        let all = ids.len();
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), all);
    }

    #[test]
    fn every_reference_of_the_document_leads_somewhere() {
        let document: serde_json::Value = serde_json::from_str(&openapi_json()).unwrap();
        let mut waiting = vec![&document];
        while let Some(value) = waiting.pop() {
            match value {
                serde_json::Value::Object(map) => {
                    if let Some(target) = map.get("$ref").and_then(|target| target.as_str()) {
                        assert!(document.pointer(target.trim_start_matches('#')).is_some(), "{target}");
                    }
                    waiting.extend(map.values());
                }
                serde_json::Value::Array(list) => waiting.extend(list),
                _ => {}
            }
        }
    }
}
