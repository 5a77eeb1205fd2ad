//! A short comparison with the installed programs, through the binary.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn compare(arguments: &[&str], out: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_peregrine-bench"))
        .args(["compare", "--out"])
        .arg(out)
        .args(arguments)
        .output()
        .expect("the binary runs")
}

fn is_installed(program: &str) -> bool {
    ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"]
        .iter()
        .any(|folder| Path::new(folder).join(program).is_file())
}

#[test]
fn a_short_comparison_measures_and_keeps_its_raw_runs_without_paths() {
    let out = tempfile::tempdir().expect("a scratch folder");
    let arguments = [
        "--seconds",
        "1",
        "--rounds",
        "1",
        "--scenarios",
        "h1-100b,switching",
        "--peregrine",
        "no/such/binary",
    ];
    let done = compare(&arguments, out.path());
    let (stdout, stderr) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    let missing = ["nginx", "wrk", "h2load"].into_iter().find(|program| !is_installed(program));
    if let Some(missing) = missing {
        assert!(!done.status.success() && stderr.contains(missing) && stderr.contains("apt-get"), "{stderr}");
        return;
    }
    if std::thread::available_parallelism().is_ok_and(|cores| cores.get() < 2) {
        assert!(!done.status.success() && stderr.contains("two different cores"), "{stderr}");
        return;
    }
    assert!(done.status.success(), "{stderr}");
    assert!(stdout.contains("| nginx |"), "{stdout}");
    assert!(stdout.contains("**peregrine did not take part**: no binary at no/such/binary"), "{stdout}");

    let day = fs::read_dir(out.path()).expect("a folder").next().expect("a day").expect("readable").path();
    let raw = fs::read_dir(day)
        .expect("a folder")
        .map(|entry| entry.expect("readable").path())
        .find(|path| path.extension().is_some_and(|kind| kind == "json"))
        .expect("raw runs");
    let text = fs::read_to_string(raw).expect("readable");
    let scratch = std::env::temp_dir();
    assert!(!text.contains(&*scratch.to_string_lossy()), "a path of this machine is in the raw runs");
    let report: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    for scenario in report["scenarios"].as_array().expect("scenarios") {
        let nginx = &scenario["closed"][0];
        assert_eq!(nginx["contender"], "nginx");
        assert!(nginx["requests"].as_u64().expect("a count") > 0);
        assert!(nginx["cpu_us_per_request"].as_f64().expect("a figure") > 0.0);
        assert!(nginx["memory_kib"].as_u64().expect("a figure") > 0);
        assert!(nginx["upstream_requests"].as_u64() >= nginx["requests"].as_u64());
        assert!(scenario["open"][0]["p99_us"].as_u64().expect("a figure") > 0);
    }
    assert_eq!(report["scenarios"][1]["name"], "switching");
    assert!(report["scenarios"][1]["closed"][0]["switches"].as_u64().expect("a count") >= 1);
}

#[test]
fn a_comparison_that_would_take_too_long_is_refused_before_it_starts() {
    let out = tempfile::tempdir().expect("a scratch folder");
    let refused = compare(&["--seconds", "60", "--rounds", "20", "--contenders", "nginx"], out.path());
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(stderr.contains("lower --seconds") || stderr.contains("not installed"), "{stderr}");
    assert_eq!(fs::read_dir(out.path()).expect("a folder").count(), 0);
}
