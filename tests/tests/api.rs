//! The control socket and the verbs that use it, against a running monitor: what its description says, wrong input, slow
//! clients, and a monitor that dies.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::Duration;

use jsonschema::Validator;
use serde_json::{Value, json};
use tests::conformance::wait_until;
use tests::monitor::{Monitor, skipped, text, vmm};

/// A monitor whose machine writes; none if this host has no KVM.
fn start(test: &str, args: &[&str]) -> Option<Monitor> {
    let all = ["run", "--memory", "size=64M", "--cmdline", "workload=mixed region=48M quiet=on"];
    (!skipped(test)).then(|| Monitor::observing(&[&all, args].concat()))
}

fn log(args: &[&str], path: &Path) -> Output {
    vmm().arg("log").args(args).arg(path).output().unwrap()
}

/// The description's schema at `pointer`, with what it refers to.
fn validator(api: &Value, schema: &Value) -> Validator {
    let mut schema = schema.clone();
    schema["components"] = api["components"].clone();
    jsonschema::validator_for(&schema).unwrap()
}

/// Requests with bodies, those of which the description says that they are right, and others.
fn bodies(operation: &str) -> Vec<(Value, bool)> {
    match operation {
        "console" => vec![
            (json!({ "text": "ls\n" }), true),
            (json!({ "key": "ctrl-c" }), true),
            (json!({ "key": "any" }), false),
            (json!({ "text": "a", "key": "enter" }), false),
            (json!({}), false),
            (json!([1]), false),
        ],
        "track" => vec![
            (json!({ "track": "kvm-bitmap", "epoch": "40ms" }), true),
            (json!({ "track": "kvm-manual", "rearm": "dense-skip" }), true),
            (Value::Null, true),
            (json!({ "track": 1 }), false),
            (json!({ "trick": "kvm-manual" }), false),
        ],
        "migrate" => vec![
            (json!({ "to": "unix:/nowhere/at/all", "compress": "lz4", "connections": 2 }), true),
            (json!({ "to": "tcp:localhost:1", "tls_dir": "/nowhere/at/all" }), true),
            (json!({ "to": 1 }), false),
            (json!({ "to": "unix:/nowhere/at/all", "connections": 0 }), false),
            (json!({ "connections": 1 }), false),
        ],
        "dump" => vec![
            (json!({ "epochs": 2, "interval_ms": 5 }), true),
            (json!({ "epochs": 1, "interval_ms": 5, "pages": true, "full": true, "compress": "lz4" }), true),
            (json!({ "epochs": -1 }), false),
            (json!({ "interval_ms": u64::MAX }), false),
            (json!({ "compress": "rar" }), false),
            (json!({ "page": true }), false),
        ],
        "snapshot" => {
            let place = std::env::temp_dir().join(format!("api-snapshot-{}", std::process::id()));
            vec![
                (json!({ "path": place, "diff": true }), true),
                (json!({ "path": place }), true),
                (json!({ "path": place, "diff": false }), true),
                (json!({ "path": place.join("no/such/place") }), true),
                (json!({ "path": 7 }), false),
                (json!({ "path": place, "compress": "lz4" }), false),
                (json!({}), false),
            ]
        }
        _ => vec![(Value::Null, true)],
    }
}

#[test]
fn the_server_does_what_its_description_says() {
    let Some(monitor) = start("the_server_does_what_its_description_says", &[]) else { return };
    let (status, api) = monitor.call("GET", "/openapi.json", &Value::Null);
    assert_eq!(status, 200);
    let paths = api["paths"].as_object().unwrap();
    assert!(paths.len() >= 11);
    for (path, methods) in paths {
        for method in ["get", "put", "post", "delete"] {
            let Some(operation) = methods.get(method) else {
                let (status, body) = monitor.call(&method.to_uppercase(), path, &Value::Null);
                assert_eq!(status, 405, "{method} {path} is not described: {body}");
                continue;
            };
            let id = operation["operationId"].as_str().unwrap();
            if id == "shutdown" {
                continue;
            }
            for (request, right) in bodies(id) {
                let context = format!("{method} {path} with {request}");
                let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
                if !request.is_null() {
                    assert_eq!(
                        validator(&api, schema).is_valid(&request),
                        right,
                        "{context}, by the description"
                    );
                }
                let body = if request.is_null() { Vec::new() } else { request.to_string().into_bytes() };
                let (status, answer, kind) = monitor.request(&method.to_uppercase(), path, &body);
                let shown = format!("{context}: {status} {}", text(&answer[..answer.len().min(300)]));
                let described = &operation["responses"][status.to_string()];
                assert!(described.is_object(), "not described: {shown}");
                assert_eq!(status == 400, !right, "{shown}");
                let Some(content) = described.get("content") else {
                    assert!(answer.is_empty(), "{shown}");
                    continue;
                };
                let (described_kind, media) = content.as_object().unwrap().iter().next().unwrap();
                assert!(kind.starts_with(described_kind), "{kind}: {shown}");
                if described_kind == "application/json" {
                    let answer: Value = serde_json::from_slice(&answer).unwrap();
                    let validator = validator(&api, &media["schema"]);
                    let faults: Vec<_> =
                        validator.iter_errors(&answer).map(|fault| fault.to_string()).collect();
                    assert!(faults.is_empty(), "{shown}: {faults:?}");
                }
            }
        }
    }
    if let Some(Value::String(place)) = bodies("snapshot").first().map(|(body, _)| &body["path"]) {
        fs::remove_dir_all(place).unwrap();
    }
    let (status, _) = monitor.call("PUT", "/vm/shutdown", &Value::Null);
    assert_eq!(status, 204);
}

#[test]
fn what_the_machine_is_told_it_does() {
    let Some(mut monitor) = start("what_the_machine_is_told_it_does", &[]) else { return };
    assert_eq!(monitor.get("/vm")["state"], "running");
    for _ in 0..2 {
        assert_eq!(monitor.call("PUT", "/vm/pause", &Value::Null).0, 204);
        assert_eq!(monitor.get("/vm")["state"], "paused");
    }
    // What was written before is reported by the first epoch that ends after it.
    let after = |epoch: &Value| monitor.get(&format!("/dirty?after={epoch}"))["last"].clone();
    let still = after(&after(&monitor.get("/dirty")["last"]["epoch"])["epoch"]);
    // But for what the monitor tells the guest of epochs.
    let still = after(&still["epoch"]);
    assert_eq!(still["dirty_pages"], still["host_pages"], "{still}");
    assert_eq!(monitor.call("PUT", "/vm/resume", &Value::Null).0, 204);
    wait_until("the guest writes again", || monitor.get("/dirty")["last"]["dirty_pages"] != 0);

    let ranges = monitor.get("/dirty/ranges");
    let gpas: Vec<_> =
        ranges["ranges"].as_array().unwrap().iter().map(|range| range["gpa"].as_u64()).collect();
    assert!(!gpas.is_empty() && gpas.is_sorted());
    let track = json!({ "track": "kvm-bitmap", "epoch": "30ms" });
    assert_eq!(monitor.call("PUT", "/dirty/tracker", &track).0, 204);
    wait_until("it has an epoch", || monitor.get("/dirty")["totals"]["epochs"].as_u64() > Some(2));
    let dirty = monitor.get("/dirty");
    assert_eq!((&dirty["tracker"], &dirty["epoch_s"]), (&json!("kvm-bitmap"), &json!(0.03)));
    assert_eq!(dirty["totals"]["missed"], 0);
    // A machine without rings: it says so, and tracks nothing until it is told to.
    let (status, problem) = monitor.call("PUT", "/dirty/tracker", &json!({ "track": "kvm-ring" }));
    assert!(status == 409 && problem["error"].is_string(), "{problem}");
    assert_eq!(monitor.get("/dirty")["armed"], false);
    assert_eq!(monitor.call("DELETE", "/dirty/tracker", &Value::Null).0, 204);
    assert_eq!(monitor.get("/dirty")["armed"], false);
    assert_eq!(monitor.call("POST", "/dirty/dump", &json!({})).0, 409);
    assert_eq!(monitor.call("PUT", "/dirty/tracker", &json!({})).0, 204);
    let rate = monitor.dirty(&["rate"]);
    assert!(rate.status.success(), "{}", text(&rate.stderr));
    assert_eq!(monitor.call("PUT", "/vm/shutdown", &Value::Null).0, 204);
    assert_eq!(monitor.process().wait().unwrap().code(), Some(0));
    assert!(!monitor.socket().exists());
    let gone = monitor.dirty(&["rate"]);
    assert_eq!(gone.status.code(), Some(1));
    assert!(text(&gone.stderr).contains("--api-socket"), "{}", text(&gone.stderr));
}

#[test]
fn bad_requests_are_told_and_hold_nobody_up() {
    let Some(monitor) = start("bad_requests_are_told_and_hold_nobody_up", &[]) else { return };
    assert_eq!(monitor.request("PUT", "/vm/console", b"{\"text\":").0, 400);
    assert_eq!(monitor.request("PUT", "/vm/console", &[b' '; 100 << 10]).0, 413);
    assert_eq!(monitor.request("PUT", "/dirty/tracker", b"{\"track\":\"magic\"}").0, 400);
    assert_eq!(monitor.request("PUT", "/dirty/tracker", b"{\"epoch\":\"1ns\"}").0, 400);
    assert_eq!(monitor.request("PUT", "/dirty/tracker", b"{\"track\":\"uffd-serve\"}").0, 400);
    assert_eq!(monitor.request("GET", "/dirty?after=x", b"").0, 400);
    assert_eq!(monitor.request("GET", "/etc/passwd", b"").0, 404);
    let (status, body) = monitor.call("POST", "/dirty/dump", &json!({ "path": "/nowhere/at/all" }));
    assert!(status == 400 && body["error"].as_str().unwrap().contains("/nowhere/at/all"), "{body}");
    assert_eq!(monitor.call("POST", "/dirty/dump", &json!({ "full": true })).0, 400);
    // Not HTTP, and too long a head.
    assert!(text(&monitor.raw(b"\x16\x03\x01 hello\r\n\r\n")).starts_with("HTTP/1.1 400"));
    let long = format!("GET /vm HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    let answer = text(&monitor.raw(long.as_bytes()));
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    // Clients that do not finish what they say.
    let slow: Vec<_> = (0..30)
        .map(|_| {
            let mut stream = UnixStream::connect(monitor.socket()).unwrap();
            stream.write_all(b"GET /vm HTTP/1.1\r\nho").unwrap();
            stream
        })
        .collect();
    assert_eq!(monitor.call("GET", "/vm", &Value::Null).0, 200);
    // One that reads nothing of a dump holds up neither the machine nor who asks for something else.
    let mut lazy = UnixStream::connect(monitor.socket()).unwrap();
    let body = json!({ "pages": true, "full": true, "interval_ms": 10 }).to_string();
    let head = format!("POST /dirty/dump HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", body.len());
    lazy.write_all((head + &body).as_bytes()).unwrap();
    wait_until("the dump runs", || monitor.get("/dirty/dump")["running"] == true);
    std::thread::sleep(Duration::from_millis(200));
    for _ in 0..3 {
        assert_eq!(
            (
                monitor.call("GET", "/vm", &Value::Null).0,
                monitor.call("GET", "/metrics", &Value::Null).0,
                monitor.call("GET", "/dirty", &Value::Null).0
            ),
            (200, 200, 200)
        );
    }
    assert_eq!(monitor.call("POST", "/dirty/dump", &json!({})).0, 409);
    assert_eq!(monitor.call("PUT", "/dirty/tracker", &json!({})).0, 409);
    let (status, dump) = monitor.call("DELETE", "/dirty/dump", &Value::Null);
    assert!(status == 200 && dump["running"] == false && dump["error"].is_string(), "{dump}");
    drop((lazy, slow));
}

#[test]
fn dumps_are_whole_or_not_there() {
    let Some(mut monitor) = start("dumps_are_whole_or_not_there", &[]) else { return };
    let (ranges, pages) = (monitor.file("ranges"), monitor.file("pages"));
    let output =
        monitor.dirty(&["dump", "--epochs", "4", "--interval", "20ms", "-o", ranges.to_str().unwrap()]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = monitor.dirty(&[
        "--json",
        "dump",
        "--epochs",
        "3",
        "--interval",
        "20ms",
        "--pages",
        "--full",
        "--compress",
        "zstd",
        "-o",
        pages.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&status["epochs"], &status["running"]), (&json!(4), &json!(false)));
    assert!(log(&["verify"], &pages).status.success());
    let info: Value = serde_json::from_slice(&log(&["info", "--json"], &pages).stdout).unwrap();
    assert_eq!((&info["end"]["epochs"], &info["header"]["contents"]), (&json!(4), &json!(true)));
    assert_eq!(info["bytes"], fs::metadata(&pages).unwrap().len());
    assert!(text(&log(&["ranges"], &ranges).stdout).contains("epoch 3"));
    let csv = text(&log(&["export", "--csv"], &ranges).stdout);
    let json = text(&log(&["export", "--json"], &ranges).stdout);
    assert!(csv.lines().count() == json.lines().count() + 1 && csv.starts_with("epoch,"));
    // As a stream.
    let output = monitor.dirty(&["dump", "--epochs", "2", "--interval", "20ms", "-o", "-"]);
    let streamed = monitor.file("streamed");
    fs::write(&streamed, &output.stdout).unwrap();
    assert!(log(&["verify"], &streamed).status.success());
    // Pictures.
    for (name, magic) in [("map.png", &b"\x89PNG"[..]), ("map.svg", b"<svg")] {
        let picture = monitor.file(name);
        let drawn = vmm().args(["log", "heatmap"]).arg(&ranges).arg("-o").arg(&picture).output().unwrap();
        assert!(drawn.status.success(), "{}", text(&drawn.stderr));
        assert!(fs::read(&picture).unwrap().starts_with(magic));
    }
    assert!(text(&log(&["heatmap"], &ranges).stdout).contains("dirty memory over time"));

    // What is cut short or changed is refused, and leaves what was there.
    let whole = fs::read(&pages).unwrap();
    let (broken, image) = (monitor.file("broken"), monitor.file("image"));
    fs::write(&image, "before").unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    for bytes in [&whole[..whole.len() - 1], &whole[..whole.len() / 2], &flipped, b"", b"hello, I am a log"] {
        fs::write(&broken, bytes).unwrap();
        for verb in ["verify", "info", "ranges", "heatmap"] {
            let output = log(&[verb], &broken);
            let stderr = text(&output.stderr);
            assert_eq!((output.status.code(), stderr.lines().count()), (Some(1), 1), "{verb}: {stderr}");
        }
        let output = vmm().args(["log", "apply"]).arg(&broken).arg("-o").arg(&image).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(fs::read(&image).unwrap(), b"before");
    }
    // A monitor that is killed in the middle leaves no log that is none.
    let cut = monitor.file("cut");
    let body = json!({ "path": cut, "interval_ms": 5 });
    assert_eq!(monitor.call("POST", "/dirty/dump", &body).0, 202);
    wait_until("some of it is written", || monitor.get("/dirty/dump")["epochs"].as_u64() > Some(2));
    monitor.process().kill().unwrap();
    monitor.process().wait().unwrap();
    assert!(!cut.exists());
    // Its socket is stale, and the next one takes it.
    assert!(monitor.socket().exists());
    let output = vmm()
        .args(["run", "--quiet", "--memory", "size=64M", "--duration", "100ms", "--api-socket"])
        .arg(monitor.socket())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(!monitor.socket().exists());
}

/// Ctrl-C ends a dump where an epoch ends.
#[test]
fn an_interrupted_dump_is_whole() {
    let Some(monitor) = start("an_interrupted_dump_is_whole", &[]) else { return };
    for (name, to_file) in [("file", true), ("stream", false)] {
        let path = monitor.file(name);
        let mut command = vmm();
        command.arg("dirty").arg("--api-socket").arg(monitor.socket()).args([
            "dump",
            "--interval",
            "10ms",
            "-o",
        ]);
        if to_file {
            command.arg(&path);
        } else {
            command.arg("-").stdout(fs::File::create(&path).unwrap());
        }
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        wait_until("some of it is written", || {
            let status = monitor.get("/dirty/dump");
            status["running"] == true && status["epochs"].as_u64() > Some(2)
        });
        tests::sys::signal(&child, libc::SIGINT).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "{name}");
        assert!(log(&["verify"], &path).status.success(), "{name}");
    }
}
