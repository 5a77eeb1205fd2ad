//! Replays seeds: `--seed N` one with its trace, `--seeds A..B` many with their sum, `--twice A..B` each twice, to
//! find what does not follow from the seed.

use std::process::ExitCode;

const USAGE: &str = "usage: peregrine-sim --seed N | --seeds A..B [--threads T] | --twice A..B";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match parse(&arguments) {
        Ok(Wanted::One(seed)) => one(seed),
        Ok(Wanted::Twice(seeds)) => twice(seeds),
        Ok(Wanted::Many(seeds, threads)) => many(seeds, threads),
        Err(problem) => {
            eprintln!("{problem}\n{USAGE}");
            ExitCode::from(2)
        }
    }
}

enum Wanted {
    One(u64),
    Twice(std::ops::Range<u64>),
    Many(std::ops::Range<u64>, usize),
}

fn parse(arguments: &[String]) -> Result<Wanted, String> {
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text:?} is no seed"));
    match arguments {
        [name, seed] if name == "--seed" => Ok(Wanted::One(number(seed)?)),
        [name, range] if name == "--twice" => {
            let (from, to) = range.split_once("..").ok_or(format!("{range:?} is no range A..B"))?;
            Ok(Wanted::Twice(number(from)?..number(to)?))
        }
        [name, range, rest @ ..] if name == "--seeds" => {
            let (from, to) = range.split_once("..").ok_or(format!("{range:?} is no range A..B"))?;
            let threads = match rest {
                [] => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
                [name, threads] if name == "--threads" => {
                    threads.parse().map_err(|_| format!("{threads:?} is no number of threads"))?
                }
                _ => return Err(format!("unknown: {rest:?}")),
            };
            Ok(Wanted::Many(number(from)?..number(to)?, threads))
        }
        _ => Err("a seed or a range of seeds is wanted".to_owned()),
    }
}

fn one(seed: u64) -> ExitCode {
    let (report, lines) = peregrine_sim::trace(seed);
    for line in lines {
        println!("{line}");
    }
    println!("seed {seed}: trace {:016x}, {} events", report.trace_hash, report.events);
    for violation in &report.violations {
        println!("violated {violation}");
    }
    if report.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn many(seeds: std::ops::Range<u64>, threads: usize) -> ExitCode {
    let begun = std::time::Instant::now();
    let summary = peregrine_sim::sweep(seeds, threads);
    println!("{summary}");
    let seconds = begun.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let rate = summary.seeds as f64 / seconds;
    println!("{seconds:.1} s, {rate:.0} seeds a second");
    for report in &summary.failed {
        for violation in &report.violations {
            println!("seed {} violated {violation}", report.seed);
        }
    }
    if summary.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn twice(seeds: std::ops::Range<u64>) -> ExitCode {
    let mut differ = 0_u32;
    for seed in seeds {
        let ((_, first), (_, second)) = (peregrine_sim::trace(seed), peregrine_sim::trace(seed));
        if let Some((one, other)) = first.iter().zip(&second).find(|(one, other)| one != other) {
            differ += 1;
            println!("seed {seed}: {one}\n  or: {other}");
        }
    }
    println!("{differ} seeds differ");
    if differ == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
