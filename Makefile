# The targets below are what CI runs too (.ci/run).

GO          ?= go
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2

# Everything but the namespace tests, which need root and the built clients.
PACKAGES = $$($(GO) list ./... | grep -v '/integration$$')

# As root a machine that lacks what a test needs is a failure, not a skip.
LAB = $(if $(filter 0,$(shell id -u)),require)

.DEFAULT_GOAL := help
.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: ## start a server on this machine, with its data in ./signalbox-data
	$(GO) run ./cmd/signalbox serve --data-dir ./signalbox-data

.PHONY: build
build: ## build ./signalbox as it is released
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o signalbox ./cmd/signalbox

.PHONY: test
test: ## install what the tests need, then run them all (the namespace tests as root)
	.ci/install
	$(GO) build ./...
	SIGNALBOX_LAB=$(LAB) $(GO) test -timeout 15m $(PACKAGES)
	$(MAKE) --no-print-directory clients integration

.PHONY: clients
clients: ## build the stock clients that the namespace tests drive (once)
	$(GO) run ./integration/clients

.PHONY: integration
integration: ## run the namespace tests with stock clients (as root)
	SIGNALBOX_LAB=$(LAB) $(GO) test -count=1 -timeout 20m -v ./integration

.PHONY: check
check: ## format, vet, staticcheck and the race detector
	@unformatted=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
	if [ -n "$$unformatted" ]; then echo "not formatted by gofmt:"; echo "$$unformatted"; exit 1; fi
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	CGO_ENABLED=1 $(GO) test -race -timeout 30m $(PACKAGES)

.PHONY: bench
bench: ## run the benchmarks
	$(GO) test -run '^$$' -bench . -benchmem $(PACKAGES)

.PHONY: series
series: ## measure the figures and plots of docs/load.md (25 minutes on a quiet machine; may be stopped and run again)
	$(GO) build -trimpath -buildvcs=false -o bin/ ./cmd/signalbox ./integration/load
	bin/load series --bin bin/signalbox --commit "$$(git rev-parse --short=12 HEAD)" --json docs/plots/figures.jsonl --docs docs
